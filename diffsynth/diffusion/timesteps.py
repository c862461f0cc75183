"""Distributions of the noise levels that are trained, and weights of the loss at each.

A distribution maps a uniform number u in [0, 1) to a noise level σ: it is the inverse of a cumulative distribution
function. A weighting maps σ to the factor of the sample's loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.ranges import FractionBelowOne, PositiveFloat, PositiveFraction, check_fields
from .flow_match import TRAINING_STEPS, FlowMatchScheduler, exponential_shift


@dataclass(frozen=True, kw_only=True)
class UniformTimesteps:
    """Uniform over the levels of the training grid between two boundaries.

    Args:
        min_boundary, max_boundary: Fractions of the grid in [0, 1]; 0 is its noisy end.
    """

    min_boundary: FractionBelowOne = 0.0
    max_boundary: PositiveFraction = 1.0

    def __post_init__(self):
        if not 0 <= self.min_boundary < self.max_boundary <= 1:
            raise ValueError(
                f"task.timesteps.min_boundary={self.min_boundary}, task.timesteps.max_boundary={self.max_boundary}; "
                "expected 0 <= min_boundary < max_boundary <= 1."
            )

    def __call__(self, scheduler: FlowMatchScheduler, u: Tensor) -> Tensor:
        """Noise levels (B,) in (0, 1] of uniform numbers (B,) in [0, 1)."""
        least, end = scheduler.trained
        noisier, learned = (sum(level >= sigma for level in scheduler.levels[:-1]) for sigma in (end, least))
        low, high = (int(b * len(scheduler.sigmas)) for b in (self.min_boundary, self.max_boundary))
        low, high = max(low, noisier), min(high, learned)
        if low >= high:
            raise ValueError(
                f"task.timesteps.min_boundary={self.min_boundary}, task.timesteps.max_boundary={self.max_boundary} "
                f"leave none of the noise levels from {least} to {end} that are trained; widen them."
            )
        return scheduler.sigmas[(low + u * (high - low)).long().clamp(max=high - 1)]


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimesteps:
    """σ = shift_μ(sigmoid(mean + std · n)), n normal; Esser et al. 2024, §3.1 (https://arxiv.org/abs/2403.03206).

    Args:
        mean, std: Of the normal distribution, `std` above 0; a larger mean trains noisier levels.
        mu: Shift towards noise, see `exponential_shift`.
    """

    mean: float = 0.0
    std: PositiveFloat = 1.0
    mu: float = 0.0

    def __post_init__(self):
        check_fields(self, "task.timesteps.")

    def __call__(self, scheduler: FlowMatchScheduler, u: Tensor) -> Tensor:
        """Noise levels (B,) in (0, 1) of uniform numbers (B,) in [0, 1)."""
        least, most = (self._share_below(sigma) for sigma in scheduler.trained)
        normal = torch.special.ndtri((least + u.double() * (most - least)).clamp(1e-7, 1 - 1e-7))
        return exponential_shift(torch.sigmoid(self.mean + self.std * normal), self.mu).float()

    def _share_below(self, sigma: float) -> float:
        """The probability of a noise level below σ, the inverse of the distribution's function."""
        if not 0 < sigma < 1:
            return float(sigma >= 1)
        unshifted = exponential_shift(torch.tensor(sigma, dtype=torch.float64), -self.mu)
        return torch.special.ndtr((torch.logit(unshifted) - self.mean) / self.std).item()


@dataclass(frozen=True, kw_only=True)
class UniformWeighting:
    """Every noise level has weight 1."""

    def __call__(self, scheduler: FlowMatchScheduler, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True, kw_only=True)
class BellWeighting:
    """A bell around the middle of the training grid, with mean 1; see `FlowMatchScheduler.training_weight`."""

    def __call__(self, scheduler: FlowMatchScheduler, sigma: Tensor) -> Tensor:
        """Weights (B,) of noise levels (B,) in [0, 1]."""
        return scheduler.training_weight(sigma * TRAINING_STEPS)
