"""Looking at the rows of a data set before it is trained on: what cannot be used, and how large images are."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .operators.base import check, unread
from .order.buckets import AspectBuckets, Size

logger = logging.getLogger(__name__)

SCAN_THREADS = 16


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used: its number in the metadata, counted from 1, the file at fault if any, and why."""

    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


class AllBut(Sequence[int]):
    """range(size) without some of its numbers, sorted ones; memory and time are theirs, not the range's."""

    def __init__(self, size: int, left_out: Sequence[int]):
        self.before = np.asarray(left_out, dtype=np.int64) - np.arange(len(left_out))  # how many remain before each
        self.size = size - len(left_out)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"number {index} of {self.size}")
        return index + int(np.searchsorted(self.before, index, side="right"))


@dataclass(frozen=True)
class SortedRows:
    """Samples sorted into buckets: a row stands once for each size that it is trained at.

    Args:
        rows: Row numbers (N,).
        sizes: Width and height in pixels (N, 2).
    """

    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, buckets: AspectBuckets, sizes: Iterable[tuple[int, Size]]) -> "SortedRows":
        """The samples of rows by number and size."""
        samples = [(row, *bucket) for row, size in sizes for bucket in buckets.assign(*size).values()]
        table = np.array(samples, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1:])

    def __len__(self) -> int:
        return len(self.rows)

    def size_of(self, number: int) -> Size:
        width, height = self.sizes[number].tolist()
        return width, height

    def by_size(self, count: int | None = None) -> dict[Size, np.ndarray]:
        """The numbers of the samples of each size, of the first `count` samples."""
        sizes, which = np.unique(self.sizes[:count], axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {(int(w), int(h)): np.flatnonzero(which == number) for number, (w, h) in enumerate(sizes)}


def check_rows(dataset, prompt_key: str, required: Sequence[str]) -> tuple[list[SkippedRow], list[tuple[int, Size]]]:
    """The rows that cannot be used, and of the others, where there are buckets, the number and size as stored."""
    strides = [dataset.scanned[start::SCAN_THREADS] for start in range(SCAN_THREADS)]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looks = pool.map(_look, repeat(dataset), strides, repeat(prompt_key), repeat(required))
        seen = list(chain.from_iterable(looks))
    faults = sorted((fault for fault in seen if isinstance(fault, SkippedRow)), key=lambda fault: fault.row)
    return faults, sorted(size for size in seen if not isinstance(size, SkippedRow))


def _look(dataset, numbers: Sequence[int], prompt_key: str, required: Sequence[str]) -> list:
    looks = (_check_row(dataset, number, prompt_key, required) for number in numbers)
    return [look for look in looks if look is not None]


def _check_row(dataset, number: int, prompt_key: str, required: Sequence[str]) -> SkippedRow | tuple[int, Size] | None:
    """What is wrong with a row, or its size where there are buckets."""
    row, size = dataset.rows[number], None
    if fault := _fault_of_cells(dataset, row, prompt_key, required):
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
        except Exception as error:  # Pillow's decoders raise nearly anything
            return SkippedRow(number + 1, str(row[key]), f"{key} {row[key]!r}: {error}")
    return dataset.buckets and (number, size)


def _fault_of_cells(dataset, row: dict, prompt_key: str, required: Sequence[str]) -> str | None:
    needed = [*required, *dataset.data_file_keys[:1]] if dataset.buckets else required
    given = {*row, "prompt"} if any(column in row for column in dataset.augmentation.captions) else row
    if absent := [key for key in needed if key not in given]:
        return f"has no {absent[0]}, but {', '.join(row)}"
    if empty := [key for key in dataset.data_file_keys if key in row and is_empty(row[key])]:
        return f"{empty[0]} is empty"
    if prompt_key == "prompt":
        return _fault_of_captions(dataset.augmentation, row)
    return f"{prompt_key} is empty" if is_empty(row.get(prompt_key)) else None


def _fault_of_captions(augmentation, row: dict) -> str | None:
    """Why a row has no caption that may be chosen."""
    try:
        texts = [text for text, _ in augmentation.texts(row)]
    except ValueError as error:
        return str(error)
    columns = [column for column, weight in augmentation.captions.items() if weight > 0]
    return None if any(texts) else " and ".join(f"{column} is empty" for column in columns)


def _check_fit(fit, known: Size | list[Size] | None) -> None:
    for size in known if isinstance(known, list) else [known]:
        if size is not None:
            fit.check(size)


def known_size(operator: Callable, cell: Any) -> Size | None:
    """(width, height) of the image that a cell names, or of the first of several, if its header is at hand."""
    return _first(check(operator, cell))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def write_skipped(path: str | Path, skipped: Sequence[SkippedRow], count: int, source: str) -> None:
    """Writes down which of `count` rows are left out, as JSON lines, and says how many."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        logger.warning("%d of %d rows of %s are left out; %s lists them.", len(skipped), count, source, path)


def is_empty(value) -> bool:
    """Whether a cell holds nothing: None, blank text, an empty list, or what other programs write for it, NaN."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or value == [] or value != value
