"""Randomness as a function: a sample's noise depends on (seed, purpose, epoch, index) and on nothing else.

So a run's position is one integer, resuming needs no generator state, and any number of processes draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.data import SampleAddress, generator


@dataclass(frozen=True)
class SampleRNG:
    """Random numbers for the samples of one batch, each from its own address."""

    seed: int
    addresses: Sequence[SampleAddress]

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal fp32 tensor shaped like `like` (B, …), drawn on CPU so that all devices agree."""
        rows = [torch.randn(like.shape[1:], generator=g) for g in self._generators(purpose)]
        return torch.stack(rows).to(like.device)

    def uniform(self, purpose: str) -> Tensor:
        """One number in [0, 1) a sample, fp32 (B,) on CPU."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators(purpose)])

    def _generators(self, purpose: str):
        return [generator(self.seed, purpose, epoch, index) for epoch, index in self.addresses]


@dataclass(frozen=True)
class StratifiedRNG(SampleRNG):
    """Draws whose timestep lies in that one of `bands` equal parts of its distribution which the epoch counts."""

    bands: int

    def uniform(self, purpose: str) -> Tensor:
        uniform = super().uniform(purpose)
        if purpose != "timestep":
            return uniform
        return (torch.tensor([epoch % self.bands for epoch, _ in self.addresses]) + uniform) / self.bands


@dataclass(frozen=True)
class GlobalRNG:
    """The same from torch's global generator, for code that does not address its samples."""

    batch_size: int

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=like.device)

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(self.batch_size)
