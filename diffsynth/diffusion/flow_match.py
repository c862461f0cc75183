"""Noise schedules of flow matching: x_t = (1 - σ) x₀ + σ ε, velocity v = ε - x₀, σ from 1 (noise) to 0 (data).

Shapes: B batch, N noise levels; samples are (B, …), for images (B, C, h, w) with C channels and latent size h w.

Liu et al. 2022, "Flow Straight and Fast" (https://arxiv.org/abs/2209.03003);
Esser et al. 2024, "Scaling Rectified Flow Transformers" (https://arxiv.org/abs/2403.03206).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

ALL_LEVELS = (0.0, 2.0)  # every noise level is at least the first number and below the second one
TRAINING_STEPS = 1000  # noise levels of the training grid, as the released models were trained; timestep = σ · 1000


TRAINING_MU = 0.8  # DiffSynth-Studio's shift of the training grid, at every resolution


def linear_levels(steps: int, strength: float, last: float | None = None) -> Tensor:
    """Evenly spaced, decreasing noise levels (N,).

    Args:
        strength: The part of the way from data to noise at which they begin, in (0, 1]; 1 is pure noise.
        last: The last level; None ends them one step above 0, at `strength` / N.
    """
    if last is None:
        return torch.linspace(strength, 0, steps + 1)[:-1]
    return torch.linspace(last + (1 - last) * strength, last, steps)


def shift_of_tokens(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """The shift μ of a number of image tokens, on the line through two points (tokens, μ)."""
    return low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0])


def time_shift(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards pure noise, σ' = k σ / (1 + (k - 1) σ); Esser et al. 2024, Eq. 23 with m/n = k².

    Args:
        sigmas: Noise levels of any shape, in [0, 1].
        shift: k, above 0; 1 changes nothing, and larger images need a larger one.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def exponential_shift(sigmas: Tensor, mu: float) -> Tensor:
    """Move noise levels, of any shape, towards pure noise: `time_shift` with k = e^μ, σ' = e^μ / (e^μ + 1/σ - 1)."""
    return time_shift(sigmas, math.exp(mu))


def shift_by_tokens(sigmas: Tensor, tokens: int | None, mu: float | None, shift: Callable[[int], float]) -> Tensor:
    """`exponential_shift` of noise levels of any shape by μ, which larger images need larger.

    Args:
        tokens: Number of image tokens; None takes the training grid's μ = 0.8.
        mu: μ itself, which overrides `tokens`.
        shift: μ of a number of image tokens.
    """
    if mu is None:
        mu = TRAINING_MU if tokens is None else shift(tokens)
    return exponential_shift(sigmas, mu)


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch decreasing noise levels (N,) so that the last one is `terminal` and 1 stays 1."""
    if len(sigmas) == 1:  # a single level is the first one, which must not move
        return sigmas
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


class FlowMatchScheduler:
    """Sampling steps and training noise levels of one model family.

    Attributes:
        trained: A training learns the noise levels from the first number up to, but without, the second one.

    Args:
        sigma_grid: `sigma_grid(num_inference_steps, denoising_strength=1.0, dynamic_shift_len=None, **options)` returns
            decreasing noise levels (N,) in (0, 1], fp32. The family's pipeline file defines it.
    """

    def __init__(self, sigma_grid: Callable[..., Tensor]):
        self.sigma_grid = sigma_grid
        self.training = False
        self.sigmas = self.timesteps = torch.empty(0)
        self.levels: list[float] = []
        self.trained = ALL_LEVELS

    def set_timesteps(
        self,
        num_inference_steps: int = 100,
        denoising_strength: float = 1.0,
        training: bool = False,
        sigmas: Sequence[float] | None = None,
        **grid_options,
    ) -> None:
        """Set the noise levels to the family's grid, or to the given `sigmas` (N,).

        `sigmas` and `timesteps` (N,) have one per sampling step; `levels` are the sigmas and 0, as numbers.
        """
        with torch.device("cpu"):  # also where models are built on the meta device
            if sigmas is None:
                grid = self.sigma_grid(num_inference_steps, denoising_strength=denoising_strength, **grid_options)
                sigmas = grid.tolist()
            self.levels = [*np.float32(sigmas).tolist(), 0.0]
            self.sigmas = torch.tensor(self.levels[:-1])
        self.timesteps = self.sigmas * TRAINING_STEPS
        self.training = training

    def sigma(self, timestep: Tensor) -> Tensor:
        """The grid's noise level that is nearest to timesteps () or (B,) in [0, 1000]; fp32, on the same device."""
        grid = self.timesteps.to(timestep.device)
        nearest = (grid - timestep.float().unsqueeze(-1)).abs().argmin(-1)
        return self.sigmas.to(timestep.device)[nearest]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noisy samples x_t = (1 - σ) x₀ + σ ε (B, …) of clean samples and noise (B, …) at timesteps () or (B,)."""
        return interpolate(original_samples, noise, self.sigma(timestep))

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """Euler step x + (σ_next - σ) v of samples (B, …) from the grid's level `index`; the last one ends at σ = 0."""
        return sample + velocity * (self.levels[index + 1] - self.levels[index])

    def renoise_step(self, velocity: Tensor, index: int, sample: Tensor, noise: Tensor) -> Tensor:
        """Estimate the clean samples (B, …) and add fresh noise: (1 - σ_next) x̂₀ + σ_next ε with x̂₀ = x - σ v.

        Multistep consistency sampling: Song et al. 2023, Algorithm 1 (https://arxiv.org/abs/2303.01469).
        """
        clean = sample - velocity * self.levels[index]
        return interpolate(clean, noise, torch.tensor(self.levels[index + 1]))

    def training_weight(self, timestep: Tensor) -> Tensor:
        """Bell-shaped loss weight around t = 500 for timesteps () or (B,); its mean over the grid is 1.

        w = exp(-2 ((t - 500) / 1000)²), minus its minimum, scaled to sum to 1000. For a grid of N ≠ 1000 levels it is
        scaled by N / 1000, and its second value is added, so that no level of a short grid has weight 0. All this is
        DiffSynth-Studio's definition.
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
    """Noisy samples x_t = (1 - σ) x₀ + σ ε of samples and noise (B, …) and σ () or (B,), in the samples' dtype."""
    sigma = sigma.to(clean.device).reshape(-1, *[1] * (clean.dim() - 1))
    return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values (B,) to (B, 1, …, 1), which broadcasts against samples (B, …)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def clean_estimate(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the clean samples, x̂₀ = x_σ - σ v, from x_σ and v (B, …) at noise levels (B,)."""
    return noisy - per_sample(sigma, noisy) * velocity
