"""Where every entry lies and what every sample consists of: an SQLite file that the shards can rebuild.

shards   number, name
entries  key → number of its shard
samples  number → its size in pixels, and a record: its row, and the keys of its entries in each of its variants (JSON)
about    what the cache was made of, and how (JSON by name); `samples` is a digest of them
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .shards import DamagedShard, Entry, Shard

FORMAT = 3  # of shards and index
TABLES = """
CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, shard INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (number INTEGER PRIMARY KEY, size TEXT, record TEXT);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
"""
SHARD_NAMES = "[0-9a-f]" * 32 + ".safetensors"  # anything else in their folder is somebody else's


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
            try:
                database.executescript(TABLES)
            except sqlite3.DatabaseError as error:
                raise self._unreadable(error) from error
            return database
        if not self.path.is_file():
            raise DamagedCache(
                f"{self.folder} is no cache: it has no {self.path.name}; python make_cache.py makes one."
            )
        return sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True)

    def _unreadable(self, error: sqlite3.DatabaseError) -> DamagedCache:
        return DamagedCache(  # also of one that was left in the middle of a change
            f"{self.path} cannot be read: {error}. Run make_cache.py again, which goes on with it; where it cannot, "
            "delete that file, and it is made anew from the shards."
        )

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

    def entries(self, keys: Sequence[str]) -> list[Entry]:
        """Entries, their tensors mapped from disk.

        Raises:
            DamagedCache: One is not there.
            DamagedShard: A shard cannot be read.
        """
        query = f"SELECT key, shard FROM entries WHERE key IN ({', '.join('?' * len(keys))})"
        shards = dict(self._rows(query, *keys))
        if missing := [key for key in keys if key not in shards]:
            raise DamagedCache(f"{self.folder} has no entry {missing[0]}; run make_cache.py again.")
        return [self._shard(shards[key]).read(key) for key in keys]

    def record(self, number: int) -> dict:
        """What a sample consists of."""
        record = self._one("SELECT record FROM samples WHERE number = ?", number)
        if record is None:
            raise DamagedCache(f"{self.folder} has no sample {number}.")
        return json.loads(record)

    def records(self) -> Iterator[dict]:
        """All of them, in order."""
        return (json.loads(record) for (record,) in self._rows("SELECT record FROM samples ORDER BY number"))

    def sizes(self) -> dict[tuple[int, ...], list[int]]:
        """The numbers of the samples of each size, (width, height) in pixels."""
        rows = self._rows("SELECT size, number FROM samples ORDER BY size, number")
        numbers = {tuple(json.loads(size)): [n for _, n in own] for size, own in groupby(rows, itemgetter(0))}
        return dict(sorted(numbers.items()))

    @property
    def about(self) -> dict[str, Any]:
        """What the cache was made of, and how."""
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM about")}

    @property
    def shards(self) -> dict[int, Shard]:
        """The files there should be, by number."""
        rows = self._rows("SELECT number, name FROM shards ORDER BY number")
        return {number: Shard(self.shard_folder / name) for number, name in rows}

    def keys(self) -> set[str]:
        """Of all entries."""
        return {key for (key,) in self._rows("SELECT key FROM entries")}

    def keys_by_shard(self) -> dict[int, set[str]]:
        """Of the entries that are read from each shard, by its number."""
        rows = self._rows("SELECT shard, key FROM entries ORDER BY shard")
        return {number: {key for _, key in own} for number, own in groupby(rows, itemgetter(0))}

    def require_finished(self) -> None:
        """Refuse a cache whose samples were never written down.

        Raises:
            DamagedCache: Says how to go on.
        """
        if not len(self):
            raise DamagedCache(
                f"{self.folder} is not finished; python make_cache.py with the same options goes on with it."
            )

    # Writing

    def match_shards(self) -> list[str]:
        """Forget the entries of shards that are gone, learn those of new ones; names the shards that were gone.

        Samples are there as long as all their entries are: else the cache is as one that was never finished.
        """
        known = {shard.path.name for shard in self.shards.values()}
        there = {path.name for path in self.shard_folder.glob(SHARD_NAMES)}
        gone = sorted(known - there)
        with self._database as transaction:
            if gone:
                transaction.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in gone])
                transaction.execute("DELETE FROM entries WHERE shard NOT IN (SELECT number FROM shards)")
            new = [(name,) for name in sorted(there - known)]
            transaction.executemany("INSERT INTO shards (name) VALUES (?)", new)
            for number, shard in self.shards.items():
                if gone or shard.path.name not in known:  # what was in a file that is gone, another one may hold too
                    keys = [(key, number) for key in _contents_if_readable(shard)]
                    transaction.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", keys)
            if gone and not all(key in self for record in self.records() for key in keys_of(record)):
                transaction.execute("DELETE FROM samples")
        self._open_shards = {}
        return gone

    def put(self, samples: Iterable[tuple[Sequence[int], Mapping]], about: Mapping[str, Any]) -> None:
        """Say what the samples are now, all of them (size, record), and what they were made of."""
        digest = blake2b(digest_size=8)

        def rows() -> Iterator[tuple]:
            for number, (size, record) in enumerate(samples):
                text = json.dumps(record, ensure_ascii=False)
                digest.update(text.encode())
                yield number, json.dumps(size), text

        with self._database as transaction:
            transaction.execute("DELETE FROM samples")
            transaction.execute("DELETE FROM about")
            transaction.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows())
            named = {**about, "samples": digest.hexdigest()}
            transaction.executemany("INSERT INTO about VALUES (?, ?)", [(k, json.dumps(v)) for k, v in named.items()])

    def _shard(self, number: int) -> Shard:
        if number not in self._open_shards:
            name = self._one("SELECT name FROM shards WHERE number = ?", number)
            self._open_shards[number] = Shard(self.shard_folder / name)
        return self._open_shards[number]

    def _one(self, query: str, *values: Any) -> Any:
        return next((value for (value,) in self._rows(query, *values)), None)

    def _rows(self, query: str, *values: Any) -> Iterator[tuple]:
        try:
            yield from self._database.execute(query, values)
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error


def keys_of(record: Mapping) -> Iterator[str]:
    """Of the entries that a sample consists of, in all its variants."""
    return (key for variant in record["variants"].values() for key, _ in variant["runs"])


def _contents_if_readable(shard: Shard) -> Iterable[str]:
    try:
        return shard.contents
    except DamagedShard:  # `cache_check.mend` replaces it
        return ()
