"""The rows that are the samples of a data set: all but the skipped ones, or one sample for each size of a row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .buckets import AspectBuckets, Size


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
        sizes: Width and height in pixels of each sample (N, 2), and the frames of videos (N, 3).
    """

    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, buckets: AspectBuckets, sizes: Iterable[tuple[int, Size]]) -> "SortedRows":
        """The samples of rows, which are given by number and stored size."""
        samples = [(row, *bucket) for row, size in sizes for bucket in buckets.assign(*size).values()]
        table = np.array(samples, dtype=np.int64).reshape(len(samples), -1)
        return cls(table[:, 0], table[:, 1:])

    def __len__(self) -> int:
        return len(self.rows)

    def size_of(self, number: int) -> Size:
        """The size at which sample `number` is trained."""
        return tuple(self.sizes[number].tolist())

    def by_size(self, count: int | None = None) -> dict[Size, np.ndarray]:
        """The numbers of the samples of each size, counting only the first `count` samples."""
        sizes, which = np.unique(self.sizes[:count], axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {tuple(size): np.flatnonzero(which == number) for number, size in enumerate(sizes.tolist())}
