"""Where every entry lies and what every sample consists of: an SQLite file that the shards can rebuild.

shards   number, name
entries  key → number of its shard
samples  number → its size in pixels, and a record: its row, and the keys of its entries in each of its variants (JSON)
about    what the cache was made of, and how (JSON by name)
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from .shards import DamagedShard, Entry, Shard

TABLES = """
CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, shard INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (number INTEGER PRIMARY KEY, width INTEGER, height INTEGER, record TEXT);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
"""


class DamagedCache(ValueError):
    """A cache that lacks something, or is not what was written; the message says what and how to mend it."""


class CacheIndex:
    """The index of one cache folder; opened by each process that uses it, when it first does.

    Args:
        folder: The cache.
        writable: Create what is missing. One process at a time may.
    """

    def __init__(self, folder: str | Path, writable: bool = False):
        self.folder, self.writable = Path(folder), writable
        self._open_shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "writable": False, "_open_shards": {}}  # a worker opens its own

    @property
    def path(self) -> Path:
        return self.folder / "index.sqlite"

    @property
    def shard_folder(self) -> Path:
        return self.folder / "shards"

    @cached_property
    def _database(self) -> sqlite3.Connection:
        if self.writable:
            self.shard_folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path)
            database.executescript(TABLES)
            return database
        if not self.path.is_file():
            raise DamagedCache(
                f"{self.folder} is no cache: it has no {self.path.name}; python make_cache.py makes one."
            )
        return sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)

    def close(self) -> None:
        """Let go of the files."""
        if "_database" in self.__dict__:
            self.__dict__.pop("_database").close()
        self._open_shards = {}

    # Reading

    def __len__(self) -> int:
        """How many samples there are."""
        return self._one("SELECT count(*) FROM samples")

    def __contains__(self, key: str) -> bool:
        return self._one("SELECT 1 FROM entries WHERE key = ?", key) is not None

    def entry(self, key: str) -> Entry:
        """One entry, its tensors mapped from disk.

        Raises:
            DamagedCache: It is not there, or its shard cannot be read.
        """
        number = self._one("SELECT shard FROM entries WHERE key = ?", key)
        if number is None:
            raise DamagedCache(f"{self.folder} has no entry {key}; run make_cache.py again.")
        try:
            return self._shard(number).read(key)
        except DamagedShard as error:
            raise DamagedCache(f"{error}; python make_cache.py verify names all that is damaged.") from error

    def record(self, number: int) -> dict:
        """What a sample consists of."""
        record = self._one("SELECT record FROM samples WHERE number = ?", number)
        if record is None:
            raise DamagedCache(f"{self.folder} has no sample {number}.")
        return json.loads(record)

    def records(self) -> Iterator[dict]:
        """All of them, in order."""
        return (
            json.loads(record) for (record,) in self._database.execute("SELECT record FROM samples ORDER BY number")
        )

    def sizes(self) -> dict[tuple[int, int], list[int]]:
        """The numbers of the samples of each (width, height)."""
        sizes = self._database.execute("SELECT DISTINCT width, height FROM samples ORDER BY width, height").fetchall()
        query = "SELECT number FROM samples WHERE width = ? AND height = ? ORDER BY number"
        return {size: [number for (number,) in self._database.execute(query, size)] for size in sizes}

    @property
    def about(self) -> dict[str, Any]:
        """What the cache was made of, and how."""
        return {name: json.loads(value) for name, value in self._database.execute("SELECT name, value FROM about")}

    @property
    def shards(self) -> dict[int, Shard]:
        """The files there should be, by number."""
        rows = self._database.execute("SELECT number, name FROM shards ORDER BY number")
        return {number: Shard(self.shard_folder / name) for number, name in rows}

    def keys(self) -> set[str]:
        """Of all entries."""
        return {key for (key,) in self._database.execute("SELECT key FROM entries")}

    def keys_of(self, number: int) -> set[str]:
        """Of the entries that are read from one shard."""
        return {key for (key,) in self._database.execute("SELECT key FROM entries WHERE shard = ?", (number,))}

    def number_of(self, shard: Shard) -> int:
        return self._one("SELECT number FROM shards WHERE name = ?", shard.path.name)

    # Writing

    def match_shards(self) -> list[str]:
        """Forget the entries of shards that are gone, learn those of new ones; names the shards that were gone."""
        known = {shard.path.name: number for number, shard in self.shards.items()}
        there = {path.name for path in self.shard_folder.glob("*.safetensors")}
        with self._database as transaction:
            for name in known.keys() - there:
                transaction.execute("DELETE FROM entries WHERE shard = ?", (known[name],))
                transaction.execute("DELETE FROM shards WHERE number = ?", (known[name],))
            for name in sorted(there - known.keys()):
                number = transaction.execute("INSERT INTO shards (name) VALUES (?)", (name,)).lastrowid
                keys = [(key, number) for key in Shard(self.shard_folder / name).contents]
                transaction.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", keys)
        self._open_shards = {}
        return sorted(known.keys() - there)

    def put(self, samples: Iterable[tuple[int, int, Mapping]], about: Mapping[str, Any]) -> None:
        """Say what the samples are now, all of them (width, height, record), and what they were made of."""
        with self._database as transaction:
            transaction.execute("DELETE FROM samples")
            transaction.execute("DELETE FROM about")
            rows = ((n, w, h, json.dumps(record, ensure_ascii=False)) for n, (w, h, record) in enumerate(samples))
            transaction.executemany("INSERT INTO samples VALUES (?, ?, ?, ?)", rows)
            transaction.executemany("INSERT INTO about VALUES (?, ?)", [(k, json.dumps(v)) for k, v in about.items()])

    def _shard(self, number: int) -> Shard:
        if number not in self._open_shards:
            name = self._one("SELECT name FROM shards WHERE number = ?", number)
            self._open_shards[number] = Shard(self.shard_folder / name)
        return self._open_shards[number]

    def _one(self, query: str, *values: Any) -> Any:
        row = self._database.execute(query, values).fetchone()
        return None if row is None else row[0]
