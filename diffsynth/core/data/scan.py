"""Looking at the rows of a data set before it is trained on: what cannot be used, and how large images are."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from .buckets import AspectBuckets, Size
from .operators import check, unread
from .unread import Unread

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

    def by_size(self) -> dict[Size, np.ndarray]:
        """The numbers of the samples of each size."""
        sizes, which = np.unique(self.sizes, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {(int(w), int(h)): np.flatnonzero(which == number) for number, (w, h) in enumerate(sizes)}


def look_at_rows(dataset, prompt_key: str, required: Sequence[str]) -> tuple[list[SkippedRow], list[tuple[int, Size]]]:
    """The rows that cannot be used, and of the others, where there are buckets, the number and size as stored."""
    strides = [dataset.scanned[start::SCAN_THREADS] for start in range(SCAN_THREADS)]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looks = pool.map(_look, repeat(dataset), strides, repeat(prompt_key), repeat(required))
        seen = list(chain.from_iterable(looks))
    faults = sorted((fault for fault in seen if isinstance(fault, SkippedRow)), key=lambda fault: fault.row)
    return faults, sorted(size for size in seen if not isinstance(size, SkippedRow))


def _look(dataset, numbers: Sequence[int], prompt_key: str, required: Sequence[str]) -> list:
    return list(chain.from_iterable(_look_at(dataset, number, prompt_key, required) for number in numbers))


def _look_at(dataset, number: int, prompt_key: str, required: Sequence[str]) -> Iterator[SkippedRow | tuple[int, Size]]:
    row = dataset.rows[number]
    fault = _fault_of_cells(row, prompt_key, required)
    if fault:
        yield SkippedRow(number + 1, None, fault)
        return
    for key in [key for key in dataset.operators if key in row]:
        if key in dataset.data_file_keys and is_empty(row[key]):
            yield SkippedRow(number + 1, None, f"{key} is empty")
            return
        try:
            known = check(dataset.operators[key], row[key])
            if dataset.fit and key in dataset.data_file_keys and not dataset.buckets:
                _check_fit(dataset.fit, known)
        except Exception as error:  # Pillow's decoders raise nearly anything
            yield SkippedRow(number + 1, str(row[key]), f"{key} {row[key]!r}: {error}")
            return
    if dataset.buckets:
        yield number, _size(dataset, row)


def _fault_of_cells(row: dict, prompt_key: str, required: Sequence[str]) -> str | None:
    absent = [key for key in required if key not in row]
    if absent:
        return f"has no {absent[0]}, but {', '.join(row)}"
    return f"{prompt_key} is empty" if is_empty(row.get(prompt_key)) else None


def _check_fit(fit, known: Size | list[Size] | None) -> None:
    for size in known if isinstance(known, list) else [known]:
        if size is not None:
            fit.check(size)


def _size(dataset, row: dict) -> Size:
    """Size of the first image of a row."""
    key = dataset.data_file_keys[0]
    image = unread(dataset.operators[key], row[key])
    first: Unread = image[0] if isinstance(image, list) else image
    return first.size


def is_empty(value) -> bool:
    """Whether a cell holds nothing: None, blank text, or what other programs write for it, NaN."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or value != value
