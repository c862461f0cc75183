"""The order of samples over buckets and weighted data sets, as a function of the position, like `SampleOrder`.

There are two levels. The samples of a bucket are a mixture of the samples of its data sets. The batches of a run are a
mixture of the batches of the buckets. A mixture orders the items of each epoch by a permutation that the epoch keys.
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
    """An endless sequence of items, with `rate` items per epoch."""

    rate: Fraction

    def before(self, epochs: int | Fraction) -> int:
        """The number of items in that many epochs: `epochs * rate`, rounded."""


@dataclass(frozen=True)
class Mixture:
    """A stream of the items of several streams, in random order within each epoch.

    Args:
        streams: The streams.
        seed: Seed of the order.
    """

    streams: Sequence[Stream]
    seed: int

    @cached_property
    def rate(self) -> Fraction:
        return sum(stream.rate for stream in self.streams)

    def before(self, epochs: int | Fraction) -> int:
        return sum(stream.before(epochs) for stream in self.streams)

    def epoch_of(self, position: int) -> int:
        """The epoch of the item at `position`."""
        # Rounding moves each stream by less than one item, so that only a few epochs have to be compared.
        rounding = len(self.streams)
        first, last = max(position - rounding, 0) // self.rate, (position + rounding) // self.rate
        return bisect_right(range(first, last + 1), position, key=self.before) + first - 1

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the stream that the item at `position` is from, and the item's number in that stream."""
        if len(self.streams) == 1:
            return 0, position
        epoch = self.epoch_of(position)
        starts = [stream.before(epoch) for stream in self.streams]
        ends = [stream.before(epoch + 1) for stream in self.streams]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        number, index = permutation(position - sum(starts), sum(counts), (self.seed, epoch)), 0
        while number >= counts[index]:
            number, index = number - counts[index], index + 1
        return index, starts[index] + number


@dataclass(frozen=True)
class WeightedRows:
    """The samples of one bucket from one data set, with a weight.

    Args:
        rows: Indices of the samples, as a range or an array. An index may be in one part only: a data set that is
            trained at two sizes has two ranges of indices.
        weight: How often an epoch shows each sample: 2.5 shows each 2 or 3 times, 0.1 shows a different tenth in each
            epoch.

    Raises:
        ValueError: There are no rows, or the weight is not positive.
    """

    rows: Sequence[int]
    weight: float | Fraction = 1

    def __post_init__(self):
        if len(self.rows) == 0 or self.weight <= 0:
            raise ValueError(
                f"weight={self.weight} of {len(self.rows)} rows: expected a weight above 0 and at least one row; leave "
                "out a data set without samples"
            )

    @cached_property
    def rate(self) -> Fraction:
        return exact(self.weight) * len(self.rows)

    def before(self, epochs: int | Fraction) -> int:
        return epochs * self.rate.numerator // self.rate.denominator

    def moved(self, start: int, times: float | Fraction = 1) -> "WeightedRows":
        """The same samples with indices raised by `start`, shown `times` as often."""
        if isinstance(self.rows, range):
            rows = range(self.rows.start + start, self.rows.stop + start)
        else:
            rows = np.asarray(self.rows) + start
        return WeightedRows(rows, exact(self.weight) * exact(times))


def joined(parts: Sequence[WeightedRows]) -> WeightedRows:
    """The samples of several parts as one part, whose weight is the average over all samples."""
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([part.rows for part in parts])
    return WeightedRows(rows, sum(part.rate for part in parts) / len(rows))


def first_samples(buckets: Sequence[Sequence[WeightedRows]], count: int) -> list[list[WeightedRows]]:
    """The buckets with only the samples whose index is below `count`; empty parts and buckets are left out."""
    kept = []
    for parts in buckets:
        # The indices of a part increase, so that only its first `count` can be below `count`.
        rows = [[int(row) for row in part.rows[:count] if row < count] for part in parts]
        kept.append([WeightedRows(first, part.weight) for first, part in zip(rows, parts, strict=True) if first])
    return [parts for parts in kept if parts]


class Bucket:
    """The batches of one bucket, cut from the mixture of its parts; the next epoch completes an epoch's last batch.

    Args:
        parts: The samples of each data set.
        batch_size: Samples per batch.
        seed: Seed of the order.
    """

    def __init__(self, parts: Sequence[WeightedRows], batch_size: int, seed: int):
        self.parts, self.samples = parts, Mixture(parts, seed)
        self.orders = [SampleOrder(len(part.rows), sample_seed(seed, "part", 0, n)) for n, part in enumerate(parts)]
        self.rate = self.samples.rate / batch_size

    def before(self, epochs: int | Fraction) -> int:
        """The number of batches in that many epochs, rounded up."""
        return -(-epochs * self.rate.numerator // self.rate.denominator)

    def sample(self, position: int) -> SampleAddress:
        """The address of the sample at `position` of this bucket's batches."""
        part, number = self.samples.locate(position)
        epoch, row = self.orders[part].sample(number)
        return SampleAddress(epoch, int(self.parts[part].rows[row]))


class MixedOrder:
    """Endless epochs of buckets of mixed data sets, in random order; each batch is from one bucket.

    An epoch shows each sample as often as its weight says. If the samples of a bucket do not fill its last batch of an
    epoch, the first samples of its next epoch do. No sample is omitted, and no batch is incomplete. The `epoch` of an
    address numbers the times that the sample is shown, so that addresses never repeat.

    Args:
        buckets: The parts of each bucket.
        batch_size: Samples per optimizer step over all devices.
        seed: Seed of the order.

    Raises:
        ValueError: There are no buckets, or a bucket has no parts.
    """

    def __init__(self, buckets: Sequence[Sequence[WeightedRows]], batch_size: int, seed: int):
        if not buckets or not all(buckets):
            raise ValueError("there is no bucket, or one has no parts; leave out buckets without images")
        self.batch_size, self.seed = batch_size, seed
        self.buckets = [Bucket(parts, batch_size, sample_seed(seed, "bucket", 0, n)) for n, parts in enumerate(buckets)]
        self.batches = Mixture(self.buckets, seed)

    def sample(self, position: int) -> SampleAddress:
        """The address of the sample at `position`; with batch size B, step k shows positions k·B to (k + 1)·B - 1."""
        step, slot = divmod(position, self.batch_size)
        bucket, batch = self.batches.locate(step)
        return self.buckets[bucket].sample(batch * self.batch_size + slot)

    def steps_of(self, epochs: float) -> int:
        """The number of steps after which that many epochs are complete."""
        return self.batches.before(exact(epochs))

    def epoch_of(self, step: int) -> int:
        """The number of the epoch that a step belongs to, which is also the number of epochs completed before it."""
        return self.batches.epoch_of(step)


def exact(number: float | Fraction) -> Fraction:
    """A number as the fraction that its decimal text means: 0.1 becomes 1/10, although the float differs from it."""
    return Fraction(str(number))
