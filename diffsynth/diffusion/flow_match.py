"""Noise schedules of flow matching: x_t = (1 - σ) x₀ + σ ε, velocity v = ε - x₀, σ from 1 (noise) to 0 (data).

Liu et al. 2022, "Flow Straight and Fast" (https://arxiv.org/abs/2209.03003);
Esser et al. 2024, "Scaling Rectified Flow Transformers" (https://arxiv.org/abs/2403.03206).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TRAINING_STEPS = 1000  # noise levels of the training grid; timestep = σ · 1000


def exponential_shift(sigmas: Tensor, mu: float) -> Tensor:
    """Move noise levels towards pure noise, σ' = e^μ / (e^μ + 1/σ - 1); Esser et al. 2024, Eq. 23 with m/n = e^2μ.

    Args:
        sigmas: Noise levels in [0, 1], any shape.
        mu: 0 leaves them as they are; larger images want a larger shift.
    """
    # e^μ σ / (1 + (e^μ - 1) σ) is the same without a division by σ = 0.
    return math.exp(mu) * sigmas / (1 + (math.exp(mu) - 1) * sigmas)


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch a decreasing grid so that its last noise level is `terminal` and 1 stays 1."""
    if len(sigmas) == 1:  # one step starts at its only level; there is no end to stretch to
        return sigmas
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


class FlowMatchScheduler:
    """Sampling steps and training noise levels of one model family.

    Args:
        sigma_grid: `sigma_grid(num_inference_steps, denoising_strength=1.0, dynamic_shift_len=None, **options)` →
            decreasing noise levels (N,) in (0, 1], fp32. The family's pipeline file defines it.
    """

    def __init__(self, sigma_grid: Callable[..., Tensor]):
        self.sigma_grid = sigma_grid
        self.training = False
        self.sigmas = self.timesteps = torch.empty(0)

    def set_timesteps(
        self,
        num_inference_steps: int = 100,
        denoising_strength: float = 1.0,
        training: bool = False,
        sigmas: Sequence[float] | None = None,
        **grid_options,
    ) -> None:
        """Choose the noise levels: the family's grid, or the given `sigmas`."""
        if sigmas is not None:
            self.sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
        else:
            self.sigmas = self.sigma_grid(num_inference_steps, denoising_strength=denoising_strength, **grid_options)
        self.timesteps = self.sigmas * TRAINING_STEPS
        self.training = training

    def sigma(self, timestep: Tensor) -> Tensor:
        """Nearest noise level of the grid for timesteps () or (B,) in [0, 1000]; fp32, on the timesteps' device."""
        grid = self.timesteps.to(timestep.device)
        nearest = (grid - timestep.float().unsqueeze(-1)).abs().argmin(-1)
        return self.sigmas.to(timestep.device)[nearest]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t = (1 - σ) x₀ + σ ε for samples (B, *) and timesteps () or (B,)."""
        return interpolate(original_samples, noise, self.sigma(timestep))

    def training_target(self, sample: Tensor, noise: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The velocity v = ε - x₀ (B, *), the same at every timestep."""
        return noise - sample

    def next_sigma(self, index: int) -> float:
        """The noise level after the grid's level `index`; 0 after the last."""
        return float(self.sigmas[index + 1]) if index + 1 < len(self.sigmas) else 0.0

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """Euler step x + (σ_next - σ) v from the grid's level `index`; the last one ends at σ = 0."""
        return sample + velocity * float(self.next_sigma(index) - self.sigmas[index])

    def renoise_step(self, velocity: Tensor, index: int, sample: Tensor, noise: Tensor) -> Tensor:
        """(1 - σ_next) x̂₀ + σ_next ε with x̂₀ = x - σ v: to the data and back, which forgets the path.

        Multistep consistency sampling: Song et al. 2023, Algorithm 1 (https://arxiv.org/abs/2303.01469).
        """
        clean = sample - velocity * float(self.sigmas[index])
        return interpolate(clean, noise, torch.tensor(self.next_sigma(index)))

    def training_weight(self, timestep: Tensor) -> Tensor:
        """Bell-shaped loss weight around t = 500, mean one over the grid, for timesteps () or (B,).

        w = exp(-2 ((t - 500) / 1000)²), less its minimum, scaled to sum to 1000; for a grid of N ≠ 1000 levels it is
        scaled by N / 1000 and raised by its second value, so that no level of a short grid weighs nothing.
        """
        bell = torch.exp(-2 * ((self.timesteps - TRAINING_STEPS / 2) / TRAINING_STEPS) ** 2)
        weights = bell - bell.min()
        weights = weights * (TRAINING_STEPS / weights.sum())
        if len(weights) != TRAINING_STEPS:
            weights = weights * (len(weights) / TRAINING_STEPS)
            weights = weights + weights[1]
        nearest = (self.timesteps.to(timestep.device) - timestep.float().unsqueeze(-1)).abs().argmin(-1)
        return weights.to(timestep.device)[nearest]


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - σ) x₀ + σ ε in the samples' dtype, for samples (B, *) and σ () or (B,)."""
    sigma = sigma.to(clean.device).reshape(-1, *[1] * (clean.dim() - 1))
    return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, …, 1), to go with samples (B, …)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def clean_estimate(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x̂₀ = x_σ - σ v of x_σ and v (B, …) at noise levels (B,)."""
    return noisy - per_sample(sigma, noisy) * velocity
