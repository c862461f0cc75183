"""Randomness as a function: a sample's random numbers depend on (seed, purpose, epoch, index) and on nothing else.

Therefore a run's position is one integer, resuming needs no generator state, and any number of processes gets the same
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.data import SampleAddress, generator
from ..core.host_memory import sent


@dataclass(frozen=True)
class SampleRNG:
    """Random numbers for the B samples of a batch; each sample's depend on its own address (epoch, index)."""

    seed: int
    addresses: Sequence[SampleAddress]

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal fp32 tensor shaped like `like` (B, …); made on the CPU, so that all devices agree."""
        rows = [torch.randn(like.shape[1:], generator=g) for g in self._generators(purpose)]
        return sent(torch.stack(rows), like.device)

    def uniform(self, purpose: str) -> Tensor:
        """One uniform number in [0, 1) per sample, fp32 (B,) on CPU."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators(purpose)])

    def integers(self, purpose: str, end: int) -> list[int]:
        """One whole number in [0, end) per sample, each as likely."""
        return (self.uniform(purpose) * end).long().tolist()

    def _generators(self, purpose: str):
        return [generator(self.seed, purpose, epoch, index) for epoch, index in self.addresses]


@dataclass(frozen=True)
class StratifiedRNG(SampleRNG):
    """`SampleRNG` with stratified timesteps: those of epoch k lie in part k (mod `bands`) of the distribution.

    The distribution is cut into `bands` parts of equal probability.
    """

    bands: int

    def uniform(self, purpose: str) -> Tensor:
        uniform = super().uniform(purpose)
        if purpose != "timestep":
            return uniform
        return (torch.tensor([epoch % self.bands for epoch, _ in self.addresses]) + uniform) / self.bands


@dataclass(frozen=True)
class GlobalRNG:
    """The same methods on torch's global generator, for code that does not address its samples."""

    batch_size: int

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=like.device)

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(self.batch_size)

    def integers(self, purpose: str, end: int) -> list[int]:
        return torch.randint(end, (self.batch_size,)).tolist()
