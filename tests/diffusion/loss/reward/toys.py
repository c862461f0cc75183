"""Problems on a line whose answers are known: Gaussians, a mixture of two, their tilts, velocities and samplers.

A point of the line is a sample of one dimension; x has shape (B, 1), and noise levels (B,). A reward R tilts a density
p to p* ∝ p exp(R / τ), which is the optimum of E[R] - τ KL(p* ‖ p); its value is τ log Z. All is fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.diffusion.flow_match import clean_estimate, time_shift
from diffsynth.diffusion.sde import transition

Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, sigma) (B, 1) at x (B, 1) and noise levels (B,)

POINTS = torch.linspace(-12, 12, 48_001, dtype=torch.float64)  # of densities; the sums below are exact to 1e-9


# Densities ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Σ w N(mean, std²) on the line."""

    means: tuple[float, ...] = (0.0,)
    std: float = 1.0
    weights: tuple[float, ...] = (1.0,)

    def density(self) -> Tensor:
        """The density at `POINTS`."""
        means, weights = (torch.tensor(values, dtype=torch.float64) for values in (self.means, self.weights))
        parts = torch.exp(-((POINTS[:, None] - means) ** 2) / (2 * self.std**2)) * weights
        return normalised(parts.sum(1))

    def posterior(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The probability (B, K) of each part given x_σ = x."""
        means, weights = (torch.tensor(values, dtype=torch.float64) for values in (self.means, self.weights))
        apart = x - (1 - sigma[:, None]) * means
        return torch.softmax(weights.log() - apart.pow(2) / (2 * self._variance(sigma)), dim=1)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[ε - x₀ | x_σ = x] (B, 1); of one Gaussian (x - m - s² (1-σ) (x - (1-σ) m) / D) / σ."""
        apart = x - (1 - sigma[:, None]) * torch.tensor(self.means, dtype=torch.float64)
        clean = torch.tensor(self.means) + (1 - sigma[:, None]) * self.std**2 * apart / self._variance(sigma)
        noise = sigma[:, None] * apart / self._variance(sigma)
        return (self.posterior(x, sigma) * (noise - clean)).sum(1, keepdim=True)

    def _variance(self, sigma: Tensor) -> Tensor:
        """D (B, 1), the variance of x_σ around (1 - σ) m of each part."""
        return (((1 - sigma) * self.std) ** 2 + sigma**2)[:, None]


TWO_MODES = Mixture((-2.0, 2.0), 0.5, (0.5, 0.5))


def normalised(density: Tensor) -> Tensor:
    return density / (density.sum() * (POINTS[1] - POINTS[0]))


def mean_of(density: Tensor, values: Tensor) -> float:
    """E[values] under a density, both at `POINTS`."""
    return (normalised(density) * values).sum().item() * (POINTS[1] - POINTS[0]).item()


def moments(density: Tensor) -> tuple[float, float]:
    """Mean and variance."""
    mean = mean_of(density, POINTS)
    return mean, mean_of(density, (POINTS - mean) ** 2)


def tilted(density: Tensor, reward: Tensor, temperature: float) -> Tensor:
    """p* ∝ p exp(R / τ) at `POINTS`."""
    return normalised(density * torch.exp(reward / temperature))


def kl_of(density: Tensor, other: Tensor) -> float:
    ratio = (density.clamp_min(1e-300) / other.clamp_min(1e-300)).log()
    return mean_of(density, ratio)


# Samplers -------------------------------------------------------------------------------------------------------------


def grid(steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels (N + 1,) from 1 to 0."""
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def law_of_sampler(velocity: Velocity, levels: Tensor, scales: Tensor) -> tuple[float, float]:
    """Exact mean and variance of what `sde.transition` samples from N(0, 1), if the velocity is affine in x.

    Args:
        levels: Noise levels (N + 1,), the last one 0.
        scales: S (N,) at all but the last.
    """
    mean, variance, probes = 0.0, 1.0, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, following, scale in zip(levels[:-1], levels[1:], scales, strict=True):
        sigmas, others, both = (value.expand(2) for value in (sigma, following, scale))
        step = transition(probes, velocity(probes, sigmas), sigmas, others, both)
        offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + step.std[0].item() ** 2
    return mean, variance


def integrated(velocity: Velocity, steps: int, count: int) -> Tensor:
    """Euler's method (count,) from the `count` mid-quantiles of N(0, 1): every part of the law, without chance."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x, levels = torch.special.ndtri(quantiles)[:, None], grid(steps)
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        x = x + (following - sigma) * velocity(x, sigma.expand(count))
    return x[:, 0]


# What is learned ------------------------------------------------------------------------------------------------------


def fitted_line(x: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Slope and offset of the line in x (N,) with the least weighted squares to `target` (N,): a network for one σ."""
    roots = torch.ones_like(x) if weights is None else weights.sqrt()
    columns = torch.stack([x, torch.ones_like(x)], dim=1) * roots[:, None]
    slope, offset = torch.linalg.lstsq(columns, (target * roots)[:, None]).solution[:, 0].tolist()
    return slope, offset


def nft_velocity(data: Mixture, better: float, beta: float, x: Tensor, sigma: Tensor) -> Tensor:
    """The minimiser v + (2/β) ρ (v₊ - v) (B, 1) of DiffusionNFT without its weights, of two parts.

    r = 1 - `better` and `better` are the parts' probabilities of optimality, ρ = E[r | x_σ], and v₊ is the velocity of
    the data weighted by r. Zheng et al. 2025, "DiffusionNFT" (https://arxiv.org/abs/2509.16117).
    """
    optimality = torch.tensor([1 - better, better], dtype=torch.float64)
    weights = torch.tensor(data.weights, dtype=torch.float64) * optimality
    positive = Mixture(data.means, data.std, tuple((weights / weights.sum()).tolist()))
    rho = (data.posterior(x, sigma) * optimality).sum(1, keepdim=True)
    own = data.velocity(x, sigma)
    return own + 2 / beta * rho * (positive.velocity(x, sigma) - own)


# The weight of the old policy after n optimizer steps: by kind, (n, weight). DiffusionNFT's code of September 2025.
OLD_POLICY_DECAYS = {
    "copy": [(0, 0.0), (1000, 0.0)],
    "linear": [(0, 0.0), (100, 0.1), (499, 0.499), (500, 0.5), (5000, 0.5)],
    "delayed": [(0, 0.0), (74, 0.0), (75, 0.0), (100, 0.1875), (200, 0.9375), (209, 0.999), (5000, 0.999)],
}


def after_refreshes(count: int, gain: float, decay: float) -> float:
    """The old policy's mean after refreshes, each of which the student ends `gain` ahead of the old policy.

    `decay` is the weight of the old policy: old ← decay · old + (1 - decay) · student.
    """
    old = 0.0
    for _ in range(count):
        old = decay * old + (1 - decay) * (old + gain)
    return old


def errors_by_space(x: Tensor, clean: Tensor, noise: Tensor, velocity: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """Squared errors (B,) of a velocity (B, …) at x_σ = x in v, in x̂₀ = x - σ v and in ε̂ = x + (1 - σ) v."""
    level = sigma.reshape(-1, *[1] * (x.dim() - 1))
    estimates = velocity, clean_estimate(x, velocity, sigma), x + (1 - level) * velocity
    truths = noise - clean, clean, noise
    return tuple((own - true).pow(2).flatten(1).sum(1) for own, true in zip(estimates, truths, strict=True))
