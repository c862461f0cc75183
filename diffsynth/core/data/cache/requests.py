"""What a cache should hold, gathered on disk before anything is made: there may be more of it than memory."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

TABLES = """
CREATE TABLE samples (number INTEGER PRIMARY KEY, size TEXT, record TEXT);
CREATE TABLE variants (kind TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE requests (
    key TEXT PRIMARY KEY, unit INTEGER, side TEXT, name TEXT, shape TEXT, number INTEGER, variant TEXT
);
"""


class UnitJob(NamedTuple):
    """One unit over one sample.

    Args:
        key: Name of the cache entry that holds its outputs.
        unit: Number of the unit among the frozen ones; -1 for an input of the pipeline that is kept as it is.
        side: Where the outputs belong: `shared`, `posi` or `nega`.
        name: Of the input that is kept as it is.
    """

    key: str
    unit: int
    side: str
    name: str = ""


class CacheRequest(NamedTuple):
    """An entry that a sample needs.

    Args:
        job: What makes it.
        shape: Requests of equal shape go through a network together.
        number, variant: The sample from which it can be made; others may need it as well.
    """

    job: UnitJob
    shape: str
    number: int
    variant: str


class CacheRequests:
    """Entries that samples need, each once, and the samples' records; one file a process, merged by the first."""

    def __init__(self, path: Path, new: bool = True):
        self.path = path
        if new:
            path.unlink(missing_ok=True)
        self.database = sqlite3.connect(path)
        if new:
            self.database.executescript(TABLES)

    def add(self, number: int, size: Sequence[int], record: dict, requests: Iterable[CacheRequest]) -> None:
        """Take one sample of `size`, (width, height) in pixels."""
        row = (number, json.dumps(size), json.dumps(record, ensure_ascii=False))
        kind = json.dumps([record["weights"], list(record["variants"])])
        self.database.execute("INSERT INTO samples VALUES (?, ?, ?)", row)
        self.database.execute("INSERT OR IGNORE INTO variants VALUES (?)", (kind,))
        rows = ((*request.job, *request[1:]) for request in requests)
        self.database.executemany("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def merge(self, paths: Iterable[Path]) -> None:
        """Take over what other processes gathered."""
        for path in paths:
            self.database.commit()
            self.database.execute("ATTACH ? AS other", (str(path),))
            self.database.execute("INSERT INTO samples SELECT * FROM other.samples")
            self.database.execute("INSERT OR IGNORE INTO variants SELECT * FROM other.variants")
            self.database.execute("INSERT OR IGNORE INTO requests SELECT * FROM other.requests")
            self.database.commit()
            self.database.execute("DETACH other")

    def close(self) -> None:
        """Put it on disk."""
        self.database.commit()
        self.database.close()

    def samples(self) -> Iterator[tuple[Sequence[int], dict]]:
        """Size and record of all samples, in order."""
        rows = self.database.execute("SELECT size, record FROM samples ORDER BY number")
        return ((json.loads(size), json.loads(record)) for size, record in rows)

    def variants(self) -> list[tuple[list[float], list[str]]]:
        """The weights of captions and the names of variants that samples have: each combination once."""
        return [json.loads(kind) for (kind,) in self.database.execute("SELECT kind FROM variants")]

    def __len__(self) -> int:
        """How many entries are needed."""
        return self.database.execute("SELECT count(*) FROM requests").fetchone()[0]

    def batches(self, batch_size: int) -> Iterator[list[CacheRequest]]:
        """All requests, those of one unit and of similar shapes together.

        Which of them stand together does not depend on what is there already: networks may round otherwise in other
        company, and a cache that was interrupted shall end as one that was not.
        """
        rows = self.database.execute("SELECT * FROM requests ORDER BY unit, shape, key")
        for _, requests in groupby(map(_from_row, rows), key=lambda request: request.job.unit):
            for _, batch in groupby(enumerate(requests), key=lambda pair: pair[0] // batch_size):
                yield [request for _, request in batch]


def _from_row(row: tuple) -> CacheRequest:
    return CacheRequest(UnitJob(*row[:4]), *row[4:])
