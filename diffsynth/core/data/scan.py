"""Check the rows of a data set before training: find rows that cannot be used, and the sizes of images."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_text
from .operators.base import check, unread
from .order.buckets import AspectBuckets, Size

if TYPE_CHECKING:
    from .operators.augmentation import Augmentation
    from .operators.images import ImageCropAndResize
    from .unified_dataset import UnifiedDataset

logger = logging.getLogger(__name__)

SCAN_THREADS = 16  # opening a file is mostly waiting for the disk; a guess


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used.

    Args:
        row: Number of the row in the metadata, counted from 1.
        file: The file at fault, if there is one.
        reason: Why the row cannot be used.
    """

    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


class AllBut(Sequence[int]):
    """The numbers of range(size) except the `skipped` ones, which are sorted.

    Memory is proportional to the skipped numbers, not to `size`.
    """

    def __init__(self, size: int, skipped: Sequence[int]):
        self.before = np.asarray(skipped, dtype=np.int64) - np.arange(len(skipped))  # numbers that remain before each
        self.size = size - len(skipped)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"number {index} of {self.size}")
        return index + int(np.searchsorted(self.before, index, side="right"))


@dataclass(frozen=True)
class SortedRows:
    """Samples sorted into buckets: one sample for each size that a row is trained at.

    Args:
        rows: The row number of each sample (N,).
        sizes: Width and height in pixels of each sample (N, 2).
    """

    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, buckets: AspectBuckets, sizes: Iterable[tuple[int, Size]]) -> "SortedRows":
        """The samples of rows, which are given by number and stored size."""
        samples = [(row, *bucket) for row, size in sizes for bucket in buckets.assign(*size).values()]
        table = np.array(samples, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1:])

    def __len__(self) -> int:
        return len(self.rows)

    def size_of(self, number: int) -> Size:
        """(width, height) at which sample `number` is trained."""
        width, height = self.sizes[number].tolist()
        return width, height

    def by_size(self, count: int | None = None) -> dict[Size, np.ndarray]:
        """The numbers of the samples of each size, counting only the first `count` samples."""
        sizes, which = np.unique(self.sizes[:count], axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {(int(w), int(h)): np.flatnonzero(which == number) for number, (w, h) in enumerate(sizes)}


def check_rows(dataset: "UnifiedDataset", required: Sequence[str]) -> tuple[list[SkippedRow], list[tuple[int, Size]]]:
    """The rows that cannot be used, and with buckets also the number and stored size of each other row."""
    strides = [dataset.scanned[start::SCAN_THREADS] for start in range(SCAN_THREADS)]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = pool.map(_check_some, repeat(dataset), strides, repeat(required))
        results = list(chain.from_iterable(found))
    faults = sorted((fault for fault in results if isinstance(fault, SkippedRow)), key=lambda fault: fault.row)
    return faults, sorted(size for size in results if not isinstance(size, SkippedRow))


def _check_some(dataset: "UnifiedDataset", numbers: Sequence[int], required: Sequence[str]) -> list:
    results = (_check_row(dataset, number, required) for number in numbers)
    return [result for result in results if result is not None]


def _check_row(dataset: "UnifiedDataset", number: int, required: Sequence[str]) -> SkippedRow | tuple[int, Size] | None:
    """The fault of a row, or with buckets its number and stored size, or None."""
    row, size = dataset.rows[number], None
    if fault := _fault_of_cells(dataset, row, required):
        return SkippedRow(number + 1, None, fault)
    for key in [key for key in dataset.operators if key in row]:
        try:
            known = check(dataset.operators[key], row[key])
            if dataset.buckets and key == dataset.data_file_keys[0]:
                size = _first(known) or _first(unread(dataset.operators[key], row[key])).size
                for target in dataset.buckets.assign(*size).values():
                    dataset.fit.check(size, target)
            elif dataset.fit and key in dataset.data_file_keys and not dataset.buckets:
                _check_fit(dataset.fit, known)
        except Exception as error:  # Pillow's decoders raise exceptions of many types
            return SkippedRow(number + 1, str(row[key]), f"{key} {row[key]!r}: {error}")
    return dataset.buckets and (number, size)


def _fault_of_cells(dataset: "UnifiedDataset", row: dict, required: Sequence[str]) -> str | None:
    """Why a row's cells cannot be used, its files not considered; None if they can."""
    needed = [*required, *dataset.data_file_keys[:1]] if dataset.buckets else required
    given = {*row, "prompt"} if any(column in row for column in dataset.augmentation.captions) else row
    if absent := [key for key in needed if key not in given]:
        return f"has no {absent[0]}, but {', '.join(row)}"
    if empty := [key for key in dataset.data_file_keys if key in row and is_empty(row[key])]:
        return f"{empty[0]} is empty"
    return _fault_of_captions(dataset.augmentation, row)


def _fault_of_captions(augmentation: "Augmentation", row: dict) -> str | None:
    """Why a row has no caption to choose; None if it has one."""
    try:
        texts = [text for text, _ in augmentation.texts(row)]
    except ValueError as error:
        return str(error)
    columns = [column for column, weight in augmentation.captions.items() if weight > 0]
    return None if any(texts) else " and ".join(f"{column} is empty" for column in columns)


def _check_fit(fit: "ImageCropAndResize", known: Size | list[Size] | None) -> None:
    """Raise if `fit` cannot bring images of the known sizes to the size that they are trained at."""
    for size in known if isinstance(known, list) else [known]:
        if size is not None:
            fit.check(size)


def known_size(operator: Callable, cell: Any) -> Size | None:
    """(width, height) of the image in a cell, or of the first of several; None if its header is not at hand."""
    return _first(check(operator, cell))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def write_skipped(path: str | Path, skipped: Sequence[SkippedRow], count: int, source: str) -> None:
    """Write the rows that are skipped as JSON lines, and log how many of the `count` rows of `source` they are."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        logger.warning("%d of %d rows of %s are skipped; %s lists them.", len(skipped), count, source, path)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty: None, blank text, an empty list, or NaN, which other programs write for empty cells."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or value == [] or value != value
