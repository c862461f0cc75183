"""The order of samples and their randomness as functions of one position: nothing to keep, nothing to restore."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

FEISTEL_ROUNDS = 8


class SampleAddress(NamedTuple):
    """A sample of an endless run: `index` into the dataset, in pass `epoch`."""

    epoch: int
    index: int


class Sample(NamedTuple):
    """A sample and the name of its augmentation variant; None if the variants can't be listed."""

    data: Any
    epoch: int
    index: int
    variant: str | None = ""


def permutation(position: int, size: int, key: tuple[int, ...]) -> int:
    """Image of `position` under a pseudorandom permutation of range(size), in constant time and memory.

    A Feistel network permutes the next power of 4; values outside the range walk on along their cycle until they
    are back in it (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", method 2), fewer than 4 times
    on average.
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
    """64 bits of BLAKE2b, equal on every machine and in every process, unlike `hash`."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def sample_seed(seed: int, purpose: str, epoch: int, index: int) -> int:
    """Seed in [0, 2^64) of one random choice, such as "noise" or "timestep", about one sample."""
    return _hash(seed, purpose, epoch, index)


def generator(seed: int, purpose: str, epoch: int, index: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator of one random choice about one sample.

    On CPU torch uses the low 32 bits of the seed, so that of 100 000 samples about one pair shares its noise.
    """
    return torch.Generator(device).manual_seed(sample_seed(seed, purpose, epoch, index))


@dataclass(frozen=True)
class SampleOrder:
    """Endless passes over range(size), each in an order of its own."""

    size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: there are no samples to put in order")

    def sample(self, position: int) -> SampleAddress:
        """Address of the sample at `position`, counted from 0 over all passes."""
        epoch, index = divmod(position, self.size)
        return SampleAddress(epoch, permutation(index, self.size, (self.seed, epoch)) if self.shuffle else index)


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of an optimizer step are shared out.

    Args:
        batch_size: Samples per optimizer step over all devices.
        micro_batch_size: Samples per forward on one device; None becomes all that a device has in a step.
        world_size: Number of devices.

    Raises:
        ValueError: A device would have no whole number of micro-batches; names the numbers that fit.
    """

    batch_size: int
    micro_batch_size: int | None = None
    world_size: int = 1

    def __post_init__(self):
        forward = self.world_size * (1 if self.micro_batch_size is None else self.micro_batch_size)
        if self.batch_size < 1 or forward < 1:
            raise ValueError(f"{self}: every number must be at least 1")
        if self.batch_size % forward:
            raise ValueError(f"{self} has no whole number of micro-batches a device: {self._remedies(forward)}")
        if self.micro_batch_size is None:
            object.__setattr__(self, "micro_batch_size", self.batch_size // self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on one device."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def _remedies(self, forward: int) -> str:
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
    """Micro-batches of one device, for `DataLoader(batch_sampler=...)`.

    Step k trains on positions k·B to (k + 1)·B - 1 of the order, whatever the number of devices and the size of
    the micro-batches. Yields the micro-batches of `num_steps` steps from `start_step` on.
    """

    order: SampleOrder
    plan: BatchLayout
    rank: int
    start_step: int
    num_steps: int

    def __post_init__(self):
        if not 0 <= self.rank < self.plan.world_size:
            raise ValueError(f"rank={self.rank} is not one of the {self.plan.world_size} devices")

    def __len__(self) -> int:
        return self.num_steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[SampleAddress]]:
        for step in range(self.start_step, self.start_step + self.num_steps):
            yield from self.step(step)

    def step(self, step: int) -> list[list[SampleAddress]]:
        """The micro-batches of one step."""
        size = self.plan.micro_batch_size
        starts = (self._number(step, number) * size for number in range(self.plan.accumulation))
        return [[self.order.sample(position) for position in range(start, start + size)] for start in starts]

    def seed(self, step: int, number: int) -> int:
        """Seed of what the networks themselves draw in the `number`-th micro-batch of one step."""
        return sample_seed(self.order.seed, "networks", 0, self._number(step, number))

    def _number(self, step: int, number: int) -> int:
        """Which micro-batch of the whole run this is, over all devices."""
        return (step * self.plan.accumulation + number) * self.plan.world_size + self.rank


class AddressedDataset(Dataset):
    """A data set whose samples come with their address, from which their randomness follows.

    Args:
        dataset: A `TrainingData`.
    """

    def __init__(self, dataset, seed: int = 0):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, address: SampleAddress) -> Sample:
        data, variant = self.dataset.sample(address, self.seed)
        return Sample(data, *address, variant)
