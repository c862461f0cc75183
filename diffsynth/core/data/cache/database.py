"""Errors of SQLite that are the disk's, or another process's."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_THE_DISK = ("disk is full", "I/O error", "unable to open")  # in messages of SQLite


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, errors of SQLite that are the disk's or another process's become an OSError that names the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise OSError(
                f"{path} is in use by another process ({error}); wait until it ends, and run the same command again."
            ) from error
        if not any(words in str(error) for words in OF_THE_DISK):
            raise
        raise OSError(
            f"{path} cannot be used: {error}; see to its disk and run the same command again, which goes on from here."
        ) from error
