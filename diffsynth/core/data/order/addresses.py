"""The order and randomness of samples as functions of their position in a run.

There is no state to save: a run resumes from the number of its step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from ..dataset import TrainingData
    from .mixing import MixedOrder

FEISTEL_ROUNDS = 8  # four make a Feistel network strongly pseudorandom (Luby & Rackoff 1988); twice that is a guess


class SampleAddress(NamedTuple):
    """The address of a sample in an endless run: its `index` in the data set, and the `epoch` in which it is shown.

    If an epoch of the run shows the sample more or less often than once, `epoch` numbers the times that it is shown,
    from 0. Those within one epoch of the run may come in any order.
    """

    epoch: int
    index: int


class Sample(NamedTuple):
    """A sample with its address.

    Args:
        data: The `Row`; empty if the training remembers what it needs of the sample.
        epoch, index: Its `SampleAddress`.
        variant: Name of its augmentation variant; None if the variants can't be listed (random crop, shuffled tags).
    """

    data: Any
    epoch: int
    index: int
    variant: str | None = ""


def permutation(position: int, size: int, key: tuple[int, ...]) -> int:
    """The value at `position` of a pseudorandom permutation of range(size), in constant time and memory.

    A Feistel network permutes the range up to the next power of 4. It is applied again while the result is outside of
    range(size), fewer than 4 times on average (cycle walking: Black & Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains", method 2).
    """
    half_bits = ((size - 1).bit_length() + 1) // 2
    position = _feistel(position, half_bits, key)
    while position >= size:
        position = _feistel(position, half_bits, key)
    return position


def _feistel(value: int, half_bits: int, key: tuple[int, ...]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for number in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (_hash(*key, number, right) & mask)
    return left << half_bits | right


def _hash(*parts: int | str) -> int:
    """A 64-bit BLAKE2b hash, which is equal on every machine and in every process, unlike `hash`."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def sample_seed(seed: int, purpose: str, epoch: int, index: int) -> int:
    """The seed, in [0, 2^64), of one random choice (`purpose`, such as "noise" or "timestep") about one sample."""
    return _hash(seed, purpose, epoch, index)


def generator(seed: int, purpose: str, epoch: int, index: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator for one random choice about one sample; see `sample_seed`.

    On the CPU torch uses only the low 32 bits of the seed: among 100 000 samples about one pair shares its noise.
    """
    return torch.Generator(device).manual_seed(sample_seed(seed, purpose, epoch, index))


@dataclass(frozen=True)
class SampleOrder:
    """Shows range(size) again and again, each time in a different order.

    Args:
        size: Number of samples.
        seed: Seed of the orders.
    """

    size: int
    seed: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: the data set has no samples; expected at least one")

    def sample(self, position: int) -> SampleAddress:
        """The address of the sample at `position`, counted from 0 without end."""
        epoch, index = divmod(position, self.size)
        return SampleAddress(epoch, permutation(index, self.size, (self.seed, epoch)))


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of an optimizer step are divided into micro-batches and among devices.

    Args:
        batch_size: Samples per optimizer step over all devices.
        micro_batch_size: Samples per forward on one device; None takes all samples of a device at once.
        world_size: Number of devices.

    Raises:
        ValueError: The number of micro-batches per device is not whole; names the numbers that fit.
    """

    batch_size: int
    micro_batch_size: int | None = None
    world_size: int = 1

    def __post_init__(self):
        forward = self.world_size * (1 if self.micro_batch_size is None else self.micro_batch_size)
        if self.batch_size < 1 or forward < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and micro_batch_size={self.micro_batch_size} on {self.world_size} "
                "device(s); every number must be at least 1"
            )
        if self.batch_size % forward:
            parts = f"micro-batches of {self.micro_batch_size} on" if self.micro_batch_size else "equal parts for"
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided into {parts} {self.world_size} device(s): "
                f"{self._remedies(forward)}"
            )
        if self.micro_batch_size is None:
            object.__setattr__(self, "micro_batch_size", self.batch_size // self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on one device."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def _remedies(self, forward: int) -> str:
        """Numbers that fit; `forward` is the number of samples per forward over all devices."""
        below = self.batch_size // forward * forward
        batch_sizes = " or ".join(str(size) for size in (below, below + forward) if size)
        per_device, rest = divmod(self.batch_size, self.world_size)
        if rest:
            return (
                f"set batch_size={batch_sizes}; no micro_batch_size fits {self.batch_size} on {self.world_size} devices"
            )
        divisors = ", ".join(str(size) for size in range(1, per_device + 1) if per_device % size == 0)
        return f"set batch_size={batch_sizes}, or micro_batch_size to one of {divisors}"


@dataclass(frozen=True)
class BatchSampler:
    """Yields the micro-batches of one device, for `DataLoader(batch_sampler=...)`.

    With batch size B, step k trains on positions k·B to (k + 1)·B - 1 of the order, for any number of devices and any
    size of the micro-batches.

    Args:
        order: The order of samples.
        layout: How a step is divided.
        rank: Number of this device; under context parallelism, of the group of devices that share a sample's tokens.
        start_step: First step.
        num_steps: Number of steps.
    """

    order: "SampleOrder | MixedOrder"
    layout: BatchLayout
    rank: int
    start_step: int
    num_steps: int

    def __post_init__(self):
        if not 0 <= self.rank < self.layout.world_size:
            raise ValueError(
                f"rank={self.rank} is not one of the {self.layout.world_size} devices; expected a number from 0 to "
                f"{self.layout.world_size - 1}"
            )

    def __len__(self) -> int:
        return self.num_steps * self.layout.accumulation

    def __iter__(self) -> Iterator[list[SampleAddress]]:
        for step in range(self.start_step, self.start_step + self.num_steps):
            yield from self.step(step)

    def step(self, step: int) -> list[list[SampleAddress]]:
        """The micro-batches of one step on this device."""
        size = self.layout.micro_batch_size
        starts = (self._number(step, number) * size for number in range(self.layout.accumulation))
        return [[self.order.sample(position) for position in range(start, start + size)] for start in starts]

    def seed(self, step: int, number: int) -> int:
        """Seed of the networks' own random numbers, such as dropout, in micro-batch `number` of one step."""
        return sample_seed(self.order.seed, "networks", 0, self._number(step, number))

    def _number(self, step: int, number: int) -> int:
        """The number of a micro-batch over the whole run and all devices."""
        return (step * self.layout.accumulation + number) * self.layout.world_size + self.rank


class AddressedDataset(Dataset):
    """A data set that is indexed by `SampleAddress`, for a DataLoader with `BatchSampler`.

    Args:
        dataset: The data set.
        seed: Seed of the run, which together with the address determines the augmentation.
        remembers: Whether the training needs no files of the sample with this index in this variant; such a sample is
            empty. None loads all, as DataLoader workers have to.
    """

    def __init__(
        self, dataset: "TrainingData", seed: int = 0, remembers: Callable[[int, str | None], bool] | None = None
    ):
        self.dataset, self.seed, self.remembers = dataset, seed, remembers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, address: SampleAddress) -> Sample:
        if self.remembers and self.remembers(address.index, variant := self.dataset.variant_at(address, self.seed)):
            return Sample({}, *address, variant)
        data, variant = self.dataset.sample(address, self.seed)
        return Sample(data, *address, variant)
