"""What a cache should hold, gathered on disk before anything is made: there may be more of it than memory."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

TABLES = """
CREATE TABLE samples (number INTEGER PRIMARY KEY, width INTEGER, height INTEGER, record TEXT);
CREATE TABLE variants (kind TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE wishes (
    key TEXT PRIMARY KEY, unit INTEGER, side TEXT, name TEXT, shape TEXT, number INTEGER, variant TEXT
);
"""


class Wish(NamedTuple):
    """An entry that a sample needs.

    Args:
        unit: Number of what makes it.
        side, name: Where its content belongs among the pipeline's inputs.
        shape: Those of equal shape go through a network together.
        number, variant: The sample from which it can be made; others may need it as well.
    """

    key: str
    unit: int
    side: str
    name: str
    shape: str
    number: int
    variant: str


class Wishes:
    """Entries that samples need, each once, and the samples' records; one file a process, merged by the first."""

    def __init__(self, path: Path, new: bool = True):
        self.path = path
        if new:
            path.unlink(missing_ok=True)
        self.database = sqlite3.connect(path)
        if new:
            self.database.executescript(TABLES)

    def add(self, number: int, size: tuple[int, int], record: dict, wishes: Iterable[Wish]) -> None:
        """Take one sample of `size` (width, height) in pixels."""
        row = (number, *size, json.dumps(record, ensure_ascii=False))
        kind = json.dumps([record["weights"], list(record["variants"])])
        self.database.execute("INSERT INTO samples VALUES (?, ?, ?, ?)", row)
        self.database.execute("INSERT OR IGNORE INTO variants VALUES (?)", (kind,))
        self.database.executemany("INSERT OR IGNORE INTO wishes VALUES (?, ?, ?, ?, ?, ?, ?)", wishes)

    def merge(self, paths: Iterable[Path]) -> None:
        """Take over what other processes gathered."""
        for path in paths:
            self.database.commit()
            self.database.execute("ATTACH ? AS other", (str(path),))
            self.database.execute("INSERT INTO samples SELECT * FROM other.samples")
            self.database.execute("INSERT OR IGNORE INTO variants SELECT * FROM other.variants")
            self.database.execute("INSERT OR IGNORE INTO wishes SELECT * FROM other.wishes")
            self.database.commit()
            self.database.execute("DETACH other")

    def close(self) -> None:
        """Put it on disk."""
        self.database.commit()
        self.database.close()

    def samples(self) -> Iterator[tuple[int, int, dict]]:
        """Width, height and record of all samples, in order."""
        rows = self.database.execute("SELECT width, height, record FROM samples ORDER BY number")
        return ((width, height, json.loads(record)) for width, height, record in rows)

    def variants(self) -> list[tuple[list[float], list[str]]]:
        """The weights of captions and the names of variants that samples have: each combination once."""
        return [json.loads(kind) for (kind,) in self.database.execute("SELECT kind FROM variants")]

    def __len__(self) -> int:
        """How many entries are needed."""
        return self.database.execute("SELECT count(*) FROM wishes").fetchone()[0]

    def batches(self, batch_size: int) -> Iterator[list[Wish]]:
        """All wishes, those of one unit and of similar shapes together.

        Which of them stand together does not depend on what is there already: networks may round otherwise in other
        company, and a cache that was interrupted shall end as one that was not.
        """
        rows = self.database.execute("SELECT * FROM wishes ORDER BY unit, shape, key")
        for _, wishes in groupby(map(Wish._make, rows), key=lambda wish: wish.unit):
            for _, batch in groupby(enumerate(wishes), key=lambda pair: pair[0] // batch_size):
                yield [wish for _, wish in batch]
