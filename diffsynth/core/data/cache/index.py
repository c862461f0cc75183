"""The index of a cache: the shard of every entry and the entries of every sample, in an SQLite file.

Its tables are:

- `shards`: number and file name of each shard.
- `entries`: key of an entry, and the number of its shard.
- `samples`: number of a sample, its size in pixels, and its record. A record (JSON) is the sample's row and the keys of
  its entries, for each variant.
- `about`: pipeline, weights, code and options that the cache was made with (JSON by name); `samples` is a hash of them.

The entries can be rebuilt from the shards, the samples by make_cache.py.
"""

import json
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...json_text import fits, parse, to_json
from .database import naming
from .shards import DamagedShard, Entry, Shard

FORMAT = 3  # version of shards and index; raise it when either changes
TABLES = """
CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, shard INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (number INTEGER PRIMARY KEY, size TEXT, record TEXT);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
"""
LARGEST = 1 << 16  # pixels of a side; a guess, a JPEG's largest
SHARD_NAMES = "[0-9a-f]" * 32 + ".safetensors"  # other files in the folder are ignored
# Shapes of JSON values in the file, as `fits` reads them.
RECORD = {"weights": [int | float], "variants": {str: {"row": dict, "runs": [(str, str)]}}}
SIZES = ((int, int), (int, int, int))
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class DamagedCache(ValueError):
    """A cache lacks files or samples, or cannot be read; the message says what is wrong and how to repair it."""


class CacheIndex:
    """The index of one cache folder. Each process opens the file when it first uses it.

    Args:
        folder: Folder of the cache.
        writable: Allow writing, and create the folder and the file if they are missing; one process at a time may.
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
        with self._explained():
            return self._opened()

    def _opened(self) -> sqlite3.Connection:
        if self.writable:
            self.shard_folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path)
            self._check_format(database)
            database.executescript(TABLES)
            return database
        if not self.path.is_file():
            raise DamagedCache(
                f"{self.folder} is no cache: it has no {self.path.name}; python make_cache.py makes one."
            )
        database = sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True)
        self._check_format(database)
        return database

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Inside, errors of SQLite become an OSError if the disk is full or fails, and else a `DamagedCache`."""
        try:
            with naming(self.path):
                yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def _check_schema(self, database: sqlite3.Connection) -> None:
        """Refuse a file that does more than hold tables: it may be anybody's, and no trigger or view of it may run."""
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute(f"PRAGMA query_only = {'OFF' if self.writable else 'ON'}")
        for kind, name, sql in database.execute("SELECT type, name, sql FROM sqlite_master"):
            if kind not in ("table", "index") or str(sql).upper().startswith("CREATE VIRTUAL"):
                raise DamagedCache(
                    f"{self.path} has a {kind!s:.99} {name!r:.99}; expected tables alone. Delete that file and run "
                    "make_cache.py again, which makes it from the shards."
                )

    def _check_format(self, database: sqlite3.Connection) -> None:
        """Refuse a cache of another version of the program, whose tables have other columns."""
        self._check_schema(database)
        columns = [row[1] for row in database.execute("PRAGMA table_info(samples)")]
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
        query = "SELECT value FROM about WHERE name = 'format'"
        (found,) = (database.execute(query).fetchone() if "about" in tables else None) or (str(FORMAT),)
        if found != str(FORMAT) or columns not in ([], ["number", "size", "record"]):
            raise DamagedCache(
                f"{self.folder} has another format than {FORMAT}, the one that this version of the program reads; "
                "delete the folder and run make_cache.py again."
            )

    def _unreadable(self, error: object) -> DamagedCache:
        return DamagedCache(  # raised also for a file whose writer was killed, which the next writer repairs
            f"{self.path} cannot be read: {error}. Run make_cache.py again, which repairs it; if that fails, delete "
            "that file first: make_cache.py then makes it from the shards."
        )

    def close(self) -> None:
        """Close the files; the next use opens them again."""
        if "_database" in self.__dict__:
            self.__dict__.pop("_database").close()
        self._open_shards = {}

    # Reading

    def __len__(self) -> int:
        """Number of samples."""
        return self._one("SELECT count(*) FROM samples")

    def __contains__(self, key: str) -> bool:
        """Whether the cache has an entry of this key."""
        return self._one("SELECT 1 FROM entries WHERE key = ?", key) is not None

    def entries(self, keys: Sequence[str]) -> list[Entry]:
        """The entries of the keys, their tensors memory-mapped.

        Raises:
            DamagedCache: The cache has no entry of a key.
            DamagedShard: A shard cannot be read.
        """
        query = f"SELECT key, shard FROM entries WHERE key IN ({', '.join('?' * len(keys))})"
        shards = dict(self._rows(query, *keys))
        if missing := [key for key in keys if key not in shards]:
            raise DamagedCache(f"{self.folder} has no entry {missing[0]}; run make_cache.py again.")
        return [self._shard(shards[key]).read(key) for key in keys]

    def record(self, number: int) -> dict:
        """The record of a sample: its caption weights, and for each variant its row and the keys of its entries."""
        record = self._one("SELECT record FROM samples WHERE number = ?", number)
        if record is None:
            raise DamagedCache(f"{self.folder} has no sample {number}; run make_cache.py again.")
        return self._parsed(record, RECORD)

    def records(self) -> Iterator[dict]:
        """The records of all samples, in order."""
        rows = self._rows("SELECT record FROM samples ORDER BY number")
        return (self._parsed(record, RECORD) for (record,) in rows)

    def sizes(self) -> dict[tuple[int, ...], list[int]]:
        """The numbers of the samples of each size: (width, height) in pixels, and the frames of videos."""
        rows = self._rows("SELECT size, number FROM samples ORDER BY size, number")
        by_size = groupby(rows, itemgetter(0))
        numbers = {self._size(size): [number for _, number in group] for size, group in by_size}
        return dict(sorted(numbers.items()))

    def _size(self, text: Any) -> tuple[int, ...]:
        """The size that a cell gives, which may be anybody's."""
        size = self._parsed(text, object)
        if not (any(fits(size, shape) for shape in SIZES) and all(0 <= side <= LARGEST for side in size)):
            raise DamagedCache(
                f"{self.path} gives samples the size {text!s:.99}; expected [width, height] of at most {LARGEST} "
                "pixels, and the frames of videos. Delete that file and run make_cache.py again, which makes it from "
                "the shards."
            )
        return tuple(size)

    def _parsed(self, text: Any, shape: Any) -> Any:
        """The JSON value of a cell, which must have a shape (see `fits`).

        Raises:
            DamagedCache: It is no JSON, or has another shape.
        """
        try:
            value = parse(text)
        except (ValueError, TypeError) as error:
            raise self._unreadable(f"{text!r:.99} is no JSON ({error})") from None
        if not fits(value, shape):
            raise self._unreadable(f"{text!r:.99} is none of its values")
        return value

    @property
    def about(self) -> dict[str, Any]:
        """Pipeline, weights, code and options that the cache was made with."""
        return {name: self._parsed(value, object) for name, value in self._rows("SELECT name, value FROM about")}

    @property
    def shards(self) -> dict[int, Shard]:
        """The shards that the index names, by number; their files may be missing."""
        rows = self._rows("SELECT number, name FROM shards ORDER BY number")
        return {number: Shard(self._path_of(name)) for number, name in rows}

    def keys(self) -> set[str]:
        """Keys of all entries."""
        return {key for (key,) in self._rows("SELECT key FROM entries")}

    def keys_by_shard(self) -> dict[int, set[str]]:
        """Keys of the entries that are read from each shard, by the shard's number."""
        rows = self._rows("SELECT shard, key FROM entries ORDER BY shard")
        return {number: {key for _, key in group} for number, group in groupby(rows, itemgetter(0))}

    def require_finished(self) -> None:
        """Check that make_cache.py has finished: it writes the samples last.

        Raises:
            DamagedCache: There are no samples.
        """
        if not len(self):
            raise DamagedCache(
                f"{self.folder} is not finished; python make_cache.py with the same options finishes it."
            )

    # Writing

    def match_shards(self, without: Collection[Path] = ()) -> list[str]:
        """Bring the index up to date with the shard files; return the names of shards whose files are missing.

        It deletes the entries of missing shards and adds those of new ones. If a sample then lacks an entry, it deletes
        all samples, and the cache counts as unfinished.

        Args:
            without: Shards that are about to be deleted; they count as missing.
        """
        known = {shard.path.name for shard in self.shards.values()}
        present = {path.name for path in self.shard_folder.glob(SHARD_NAMES)} - {path.name for path in without}
        gone = sorted(known - present)
        with self._explained(), self._database as transaction:
            if gone:
                transaction.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in gone])
                transaction.execute("DELETE FROM entries WHERE shard NOT IN (SELECT number FROM shards)")
            new = [(name,) for name in sorted(present - known)]
            transaction.executemany("INSERT INTO shards (name) VALUES (?)", new)
            for number, shard in self.shards.items():
                if gone or shard.path.name not in known:  # an entry of a missing shard may also be in another
                    keys = [(key, number) for key in _contents_if_readable(shard)]
                    transaction.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", keys)
            if gone and not all(key in self for record in self.records() for key in keys_of(record)):
                transaction.execute("DELETE FROM samples")
        self._open_shards = {}
        return gone

    def put(self, samples: Iterable[tuple[Sequence[int], Mapping]], about: Mapping[str, Any]) -> None:
        """Replace all samples, given as (size, record), and what the cache was made with."""
        digest = blake2b(digest_size=8)

        def rows() -> Iterator[tuple]:
            for number, (size, record) in enumerate(samples):
                text = to_json(record, ensure_ascii=False)
                digest.update(text.encode())
                yield number, json.dumps(size), text

        with self._explained(), self._database as transaction:
            transaction.execute("DELETE FROM samples")
            transaction.execute("DELETE FROM about")
            transaction.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows())
            named = {**about, "samples": digest.hexdigest()}
            transaction.executemany("INSERT INTO about VALUES (?, ?)", [(k, to_json(v)) for k, v in named.items()])

    def _shard(self, number: int) -> Shard:
        if number not in self._open_shards:
            name = self._one("SELECT name FROM shards WHERE number = ?", number)
            self._open_shards[number] = Shard(self._path_of(name))
        return self._open_shards[number]

    def _path_of(self, shard_name: object) -> Path:
        """The path of a shard whose name the file gives, which may be anybody's and must not lead to another folder.

        Raises:
            DamagedCache: It is no name that a shard has.
        """
        if not SHARD_NAME.fullmatch(str(shard_name)):
            raise DamagedCache(
                f"{self.path} names a shard {shard_name!r:.99}; expected 32 hex digits and .safetensors. Delete that "
                "file and run make_cache.py again, which makes it from the shards."
            )
        return self.shard_folder / str(shard_name)

    def _one(self, query: str, *values: Any) -> Any:
        """The first column of the first row of a query; None if there is no row."""
        return next((value for (value,) in self._rows(query, *values)), None)

    def _rows(self, query: str, *values: Any) -> Iterator[tuple]:
        with self._explained():
            yield from self._database.execute(query, values)


def keys_of(record: Mapping) -> Iterator[str]:
    """Keys of the entries of a sample, in all its variants."""
    return (key for variant in record["variants"].values() for key, _ in variant["runs"])


def _contents_if_readable(shard: Shard) -> Iterable[str]:
    try:
        return shard.contents
    except DamagedShard:  # `mend` in cache/verify.py replaces the shard
        return ()
