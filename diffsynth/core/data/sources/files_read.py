"""The files on this machine that the rows of a data set name: all of a few, a sample of many."""

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ...input_files import InputFile
from .storage import PART, is_remote
from .table import Rows

SAMPLED_ROWS = 4096  # rows whose files are read; a guess: at 8 files at a time and 5 ms each, 3 s on a network disk
IMAGE_PIECES = 16  # of 4 KiB; a smaller image is read whole; a guess
TABLE_PIECE = 1 << 20  # bytes; a table of up to 64 MiB is read whole, and as much of a larger one; a guess
TABLES = (".arrow", ".csv", ".json", ".jsonl", ".parquet")


def files_of_rows(rows: Rows, columns: Sequence[str], folder: str) -> dict[str, InputFile]:
    """Return the files that cells of these columns name, by that name.

    Remote and embedded files, and those outside of the folder, are left out. The rows are all, or `SAMPLED_ROWS` that
    are chosen at random, the same in every run.
    """
    numbers: Iterable[int] = range(len(rows))
    if len(rows) > SAMPLED_ROWS:
        numbers = sorted(random.Random(0).sample(range(len(rows)), SAMPLED_ROWS))
    cells = (row[column] for row in map(rows.__getitem__, numbers) for column in columns if column in row)
    names = [name for cell in cells for name in _names(cell) if not is_remote(folder + name)]
    roots = (os.path.abspath(folder), os.path.realpath(folder))
    return {name: _file(name, folder) for name in names if _is_inside(os.path.join(folder, name), roots)}


def _is_inside(path: str, roots: Sequence[str]) -> bool:
    return any(PurePath(os.path.abspath(path)).is_relative_to(root) for root in roots)


def _names(cell: Any) -> Iterator[str]:
    """Every string in a cell; those that name no file are dropped when they are looked for."""
    if isinstance(cell, Mapping | list):
        for element in cell.values() if isinstance(cell, Mapping) else cell:
            yield from _names(element)
    elif isinstance(cell, str):
        yield cell


def _file(name: str, folder: str) -> InputFile:
    path = os.path.join(folder, name)
    if part := PART.fullmatch(path):
        return InputFile(part[1], int(part[2]), int(part[3]), IMAGE_PIECES)
    return InputFile(path, pieces=IMAGE_PIECES)


def captions_of(images: Mapping[str, InputFile]) -> dict[str, InputFile]:
    """Return the text files beside images."""
    stems = {os.path.splitext(name)[0]: os.path.splitext(image.path)[0] for name, image in images.items()}
    return {f"{name}.txt": InputFile(f"{path}.txt") for name, path in stems.items()}


def folders_of(images: Mapping[str, InputFile]) -> dict[str, InputFile]:
    """Return the folders of images, in which others may appear."""
    return {f"{folder}/": InputFile(folder) for folder in {os.path.dirname(image.path) for image in images.values()}}


def tables_in(folder: str) -> dict[str, InputFile]:
    """Return the tables in a folder, which a reader of a data set's own may read."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(TABLES)) if os.path.isdir(folder) else []
    return {name: table(os.path.join(folder, name)) for name in names}


def table(path: str) -> InputFile:
    """Return a table as a file that is read whole unless it is large."""
    return InputFile(path, piece=TABLE_PIECE)
