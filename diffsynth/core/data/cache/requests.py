"""The entries that a cache needs, collected in an SQLite file before any is made: they may exceed memory."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ...json_text import to_json
from .database import naming

TABLES = """
CREATE TABLE samples (number INTEGER PRIMARY KEY, size TEXT, record TEXT);
CREATE TABLE variants (kind TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE requests (
    key TEXT PRIMARY KEY, unit INTEGER, side TEXT, name TEXT, shape TEXT, number INTEGER, variant TEXT
);
"""


KEPT_FILE = -1  # in the place of a unit's number: an input of the pipeline is stored unchanged


class UnitJob(NamedTuple):
    """The work of one unit on one sample.

    Args:
        key: Key of the cache entry that holds the unit's outputs.
        unit: Number of the unit among the frozen ones; or `KEPT_FILE`.
        side: Side of the pipeline's inputs that the outputs belong to: `shared`, `posi` or `nega`.
        name: Name of the input that is stored unchanged.
    """

    key: str
    unit: int
    side: str
    name: str = ""


class CacheRequest(NamedTuple):
    """A cache entry that a sample needs.

    Args:
        job: The work that makes it.
        shape: Sort key that puts jobs with inputs of equal shape next to each other, so that they form a batch.
        number, variant: A sample, and its variant, that the entry can be made from; other samples may need it as well.
    """

    job: UnitJob
    shape: str
    number: int
    variant: str


class CacheRequests:
    """The entries that samples need, without duplicates, and the samples' records, in an SQLite file.

    Each process writes a file of its own; the first process merges them.

    Args:
        path: The file.
        new: Start an empty file, instead of opening an existing one.
    """

    def __init__(self, path: Path, new: bool = True):
        self.path = path
        if new:
            path.unlink(missing_ok=True)
        with naming(path):
            self.database = sqlite3.connect(path)
            if new:
                self.database.executescript(TABLES)

    def add(self, number: int, size: Sequence[int], record: dict, requests: Iterable[CacheRequest]) -> None:
        """Add a sample of `size`, (width, height) in pixels, and the entries that it needs."""
        row = (number, json.dumps(size), to_json(record, ensure_ascii=False))
        variants = json.dumps([record["weights"], list(record["variants"])])
        rows = ((*request.job, *request[1:]) for request in requests)
        with naming(self.path):
            self.database.execute("INSERT INTO samples VALUES (?, ?, ?)", row)
            self.database.execute("INSERT OR IGNORE INTO variants VALUES (?)", (variants,))
            self.database.executemany("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def merge(self, paths: Iterable[Path]) -> None:
        """Add the samples and entries from the files of other processes."""
        for path in paths:
            with naming(self.path):
                self._merge(path)

    def _merge(self, path: Path) -> None:
        self.database.commit()
        self.database.execute("ATTACH ? AS other", (str(path),))
        self.database.execute("INSERT INTO samples SELECT * FROM other.samples")
        self.database.execute("INSERT OR IGNORE INTO variants SELECT * FROM other.variants")
        self.database.execute("INSERT OR IGNORE INTO requests SELECT * FROM other.requests")
        self.database.commit()
        self.database.execute("DETACH other")

    def close(self) -> None:
        """Commit and close the file."""
        with naming(self.path):
            self.database.commit()
        self.database.close()

    def samples(self) -> Iterator[tuple[Sequence[int], dict]]:
        """The sizes and records of all samples, in order."""
        rows = self.database.execute("SELECT size, record FROM samples ORDER BY number")
        return ((json.loads(size), json.loads(record)) for size, record in rows)

    def variants(self) -> list[tuple[list[float], list[str]]]:
        """The distinct combinations, over samples, of caption weights and names of variants."""
        return [json.loads(kind) for (kind,) in self.database.execute("SELECT kind FROM variants")]

    def __len__(self) -> int:
        """Number of entries."""
        return self.database.execute("SELECT count(*) FROM requests").fetchone()[0]

    def batches(self, batch_size: int) -> Iterator[list[CacheRequest]]:
        """All requests in batches of one unit, sorted by shape.

        The batches do not depend on which entries exist already: a network may round differently in another batch, and
        an interrupted cache must end up equal to one that was not interrupted.
        """
        rows = self.database.execute("SELECT * FROM requests ORDER BY unit, shape, key")
        for _, requests in groupby(map(_from_row, rows), key=lambda request: request.job.unit):
            for _, batch in groupby(enumerate(requests), key=lambda pair: pair[0] // batch_size):
                yield [request for _, request in batch]


def _from_row(row: tuple) -> CacheRequest:
    return CacheRequest(UnitJob(*row[:4]), *row[4:])
