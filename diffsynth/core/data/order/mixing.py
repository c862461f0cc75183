"""The order of samples over buckets and mixed data sets, as a function of the position like `SampleOrder`.

Two mixtures, one above the other, each a permutation keyed by its pass: the steps of a run mix the batches of the
buckets, and the samples of a bucket mix those of its data sets.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np

from .addresses import SampleAddress, SampleOrder, permutation, sample_seed


class Stream(Protocol):
    """Endless items, `rate` of them a pass."""

    rate: Fraction

    def before(self, passes: int | Fraction) -> int:
        """Number of items of that many passes: `passes * rate`, rounded."""


@dataclass(frozen=True)
class Mixture:
    """One stream of the items of several, those of a pass in random order."""

    streams: Sequence[Stream]
    seed: int

    @cached_property
    def rate(self) -> Fraction:
        return sum(stream.rate for stream in self.streams)

    def before(self, passes: int | Fraction) -> int:
        return sum(stream.before(passes) for stream in self.streams)

    def pass_of(self, position: int) -> int:
        """The pass of the item at `position`."""
        rounding = len(self.streams)  # it moves each stream by less than one item, so that few passes are in question
        first, last = max(position - rounding, 0) // self.rate, (position + rounding) // self.rate
        return bisect_right(range(first, last + 1), position, key=self.before) + first - 1

    def locate(self, position: int) -> tuple[int, int]:
        """Which stream the item at `position` is from, and its number in that stream."""
        if len(self.streams) == 1:
            return 0, position
        epoch = self.pass_of(position)
        starts = [stream.before(epoch) for stream in self.streams]
        counts = [stream.before(epoch + 1) - start for stream, start in zip(self.streams, starts, strict=True)]
        number, index = permutation(position - sum(starts), sum(counts), (self.seed, epoch)), 0
        while number >= counts[index]:
            number, index = number - counts[index], index + 1
        return index, starts[index] + number


@dataclass(frozen=True)
class WeightedRows:
    """The samples that a bucket has from one data set.

    Args:
        rows: Their indices, as a range or an array. No index may be in two parts: a data set that is shown at two
            sizes takes two ranges of indices.
        weight: How often a pass shows each of them: 2.5 shows each 2 or 3 times, 0.1 another tenth in every pass.

    Raises:
        ValueError: There are no rows, or the weight is not positive.
    """

    rows: Sequence[int]
    weight: float | Fraction = 1

    def __post_init__(self):
        if len(self.rows) == 0 or self.weight <= 0:
            raise ValueError(
                f"weight={self.weight} of {len(self.rows)} rows: expected a weight above 0 and at least one row; leave "
                "a data set out that has nothing to show"
            )

    @cached_property
    def rate(self) -> Fraction:
        return exact(self.weight) * len(self.rows)

    def before(self, passes: int | Fraction) -> int:
        return passes * self.rate.numerator // self.rate.denominator

    def moved(self, start: int, times: float | Fraction = 1) -> "WeightedRows":
        """These samples among others, their indices raised by `start`, shown `times` as often."""
        own = self.rows
        rows = range(own.start + start, own.stop + start) if isinstance(own, range) else np.asarray(own) + start
        return WeightedRows(rows, exact(self.weight) * exact(times))


def joined(parts: Sequence[WeightedRows]) -> WeightedRows:
    """The samples of several parts as one, shown as often as they are on average."""
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([part.rows for part in parts])
    return WeightedRows(rows, sum(part.rate for part in parts) / len(rows))


def first_samples(buckets: Sequence[Sequence[WeightedRows]], count: int) -> list[list[WeightedRows]]:
    """What buckets have of the samples whose index is below `count`, in buckets that are not empty."""
    kept = []
    for parts in buckets:
        rows = [[int(row) for row in part.rows[:count] if row < count] for part in parts]  # indices of a part rise
        kept.append([WeightedRows(own, part.weight) for own, part in zip(rows, parts, strict=True) if own])
    return [parts for parts in kept if parts]


class Bucket:
    """The batches of one bucket, cut from the mixture of its parts; the next pass fills up the last one of a pass."""

    def __init__(self, parts: Sequence[WeightedRows], batch_size: int, seed: int):
        self.parts, self.samples = parts, Mixture(parts, seed)
        self.orders = [SampleOrder(len(part.rows), sample_seed(seed, "part", 0, n)) for n, part in enumerate(parts)]
        self.rate = self.samples.rate / batch_size

    def before(self, passes: int | Fraction) -> int:
        return -(-passes * self.rate.numerator // self.rate.denominator)

    def sample(self, position: int) -> SampleAddress:
        """Address of the sample at `position` of this bucket's batches."""
        part, number = self.samples.locate(position)
        epoch, row = self.orders[part].sample(number)
        return SampleAddress(epoch, int(self.parts[part].rows[row]))


class MixedOrder:
    """Endless passes over buckets of mixed data sets, in batches of one bucket each, in random order.

    A pass shows each sample as often as its weight says. Where a bucket's share of a pass does not fill its last
    batch, the first samples of its next pass do, so that no sample is left out and no batch is incomplete. The epoch
    of an address counts how often its part has been passed through; addresses never repeat.

    Args:
        buckets: The parts of each bucket.
        batch_size: Samples per optimizer step over all devices.

    Raises:
        ValueError: There are no buckets, or one has no parts.
    """

    def __init__(self, buckets: Sequence[Sequence[WeightedRows]], batch_size: int, seed: int):
        if not buckets or not all(buckets):
            raise ValueError("a bucket has no parts, or there is no bucket: leave out buckets that no image is in")
        self.batch_size, self.seed = batch_size, seed
        self.buckets = [Bucket(parts, batch_size, sample_seed(seed, "bucket", 0, n)) for n, parts in enumerate(buckets)]
        self.batches = Mixture(self.buckets, seed)

    def sample(self, position: int) -> SampleAddress:
        """Address of the sample at `position`; step k shows positions k·B to (k + 1)·B - 1."""
        step, slot = divmod(position, self.batch_size)
        bucket, batch = self.batches.locate(step)
        return self.buckets[bucket].sample(batch * self.batch_size + slot)

    def steps_of(self, passes: float) -> int:
        """Number of steps after which that many passes are complete."""
        return self.batches.before(exact(passes))

    def pass_of(self, step: int) -> int:
        """The pass that a step is in, which is also how many are complete when it begins."""
        return self.batches.pass_of(step)


def exact(number: float | Fraction) -> Fraction:
    """The number as it is written: 0.1 is a tenth, which the float is not."""
    return Fraction(str(number))
