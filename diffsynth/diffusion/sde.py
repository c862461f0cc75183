"""Stochastic sampling of flow matching, whose steps have a probability: for policy gradients.

For any scale S(σ) ≥ 0 the equation dx = (v - ½ S² s) dσ + S dw has the same marginals as dx = v dσ, where
x_σ = (1 - σ) x₀ + σ ε, σ falls from 1 to 0, and s = -(x + (1 - σ) v) / σ is the score. An Euler-Maruyama step from σ to
σ' = σ + dt, dt < 0, is Gaussian:

    mean = x (1 + S²/(2σ) dt) + v (1 + S² (1 - σ)/(2σ)) dt        std = S √(-dt)

Liu et al. 2025, "Flow-GRPO" (https://arxiv.org/abs/2505.05470); Xue et al. 2025, "DanceGRPO"
(https://arxiv.org/abs/2505.07818), whose S is constant. Shapes: B batch, N noise levels.

All log-probabilities and divergences are means over the dimensions of a sample, not sums: of D dimensions, the ratio of
two probabilities is the true one to the power 1 / D.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .flow_match import per_sample


class Transition(NamedTuple):
    """The Gaussian of a step's result: its mean (B, …) and its standard deviation (B,), in all dimensions the same."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The step's result (B, …) for standard normal noise (B, …)."""
        return self.mean + per_sample(self.std, self.mean) * noise

    def log_prob(self, moved: Tensor) -> Tensor:
        """Log-probability (B,) of results `moved` (B, …), the mean over dimensions; every std must be above 0.

        Store `moved` in fp32: rounded to bf16, it has another probability than when it was sampled.
        """
        distance = ((moved - self.mean) / per_sample(self.std, moved)).pow(2).flatten(1).mean(1)
        return -distance / 2 - self.std.log() - math.log(2 * math.pi) / 2

    def kl(self, other: Tensor) -> Tensor:
        """KL divergence (B,), the mean over dimensions, from a step of the same std whose mean is `other` (B, …)."""
        return (self.mean - other).pow(2).flatten(1).mean(1) / (2 * self.std.pow(2))


def transition(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor, scale: Tensor) -> Transition:
    """One step of the stochastic sampler; with a scale of 0 its mean is Euler's step.

    Args:
        latents, velocity: x and v (B, …), fp32.
        sigma, next_sigma: Noise levels (B,) in [0, 1], `sigma` above `next_sigma`.
        scale: S (B,).
    """
    dt, drift = next_sigma - sigma, scale.pow(2) / (2 * sigma)
    of_latents, of_velocity = 1 + drift * dt, (1 + drift * (1 - sigma)) * dt
    mean = latents * per_sample(of_latents, latents) + velocity * per_sample(of_velocity, latents)
    return Transition(mean, scale * (-dt).sqrt())


def flow_scales(sigmas: Tensor, strength: float) -> Tensor:
    """Flow-GRPO's S = a √(σ / (1 - σ)) (N,) at the decreasing levels (N,) of a sampling grid.

    At σ = 1, where this has no end, the next level takes the place of σ in the denominator.

    Args:
        sigmas: Noise levels in (0, 1], without the final 0.
        strength: a; 0.7 is the paper's.
    """
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    return strength * (sigmas / (1 - torch.where(sigmas < 1, sigmas, following))).sqrt()


def kl_weight(sigma: Tensor, next_sigma: Tensor, scale: Tensor) -> Tensor:
    """The factor (B,) of mean ‖Δv‖² in the KL divergence of a step: (|dt| / 2) (S (1 - σ)/(2σ) + 1/S)².

    Args:
        sigma, next_sigma, scale: (B,); see `transition`. Every scale must be above 0.
    """
    return (sigma - next_sigma) / 2 * (scale * (1 - sigma) / (2 * sigma) + 1 / scale).pow(2)
