"""Supervised fine-tuning by flow matching.

Lipman et al. 2022, "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747);
Liu et al. 2022, "Flow Straight and Fast", Eq. 1 (https://arxiv.org/abs/2209.03003).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..flow_match import TRAINING_STEPS, interpolate
from ..randomness import GlobalRNG
from ..timesteps import BellWeighting, UniformTimesteps
from .base import Objective


@dataclass(frozen=True, kw_only=True)
class FlowMatchSFT(Objective):
    """w(σ) · mean ‖v_θ(x_t, t) - (ε - x₀)‖² with x_t = (1 - σ) x₀ + σ ε.

    With `extra_inputs=[loss_mask]` the mean is over what that column shows white: a background, or a face to be kept
    out, then teaches nothing, and how large the mask is does not matter.

    Args:
        timesteps: Which noise levels are trained (`diffusion.timesteps`).
        weighting: w(σ).
        exact_upstream: Round timesteps to bf16 first, as the original does, and so reach 376 of 1000 levels only.
    """

    timesteps: UniformTimesteps = field(default_factory=UniformTimesteps)
    weighting: BellWeighting = field(default_factory=BellWeighting)
    exact_upstream: bool = False

    def __call__(self, pipe, rng=None, **inputs) -> Tensor:
        """Loss per sample (B,) of clean `input_latents` (B, …), unit variance, and the model's other inputs.

        A `loss_mask` (B, 1, h, w) in [0, 1] is how much each place counts.
        """
        return self.loss(pipe, rng=rng or GlobalRNG(len(inputs["input_latents"])), **inputs)

    def loss(self, pipe, input_latents: Tensor, rng, loss_mask: Tensor | None = None, **inputs) -> Tensor:
        clean = input_latents.float()
        timestep, sigma = (t.to(clean.device) for t in self.sample_timesteps(pipe.scheduler, rng))
        noise = rng.normal("noise", clean)
        velocity = pipe.predict(timestep, **{**inputs, "latents": interpolate(clean, noise, sigma)})
        error = mean_where((velocity.float() - (noise - clean)).pow(2), loss_mask)
        return error * self.weighting(pipe.scheduler, sigma)

    def sample_timesteps(self, scheduler, rng) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) in [0, 1000] and their noise levels (B,) in [0, 1]."""
        sigma = self.timesteps(scheduler, rng.uniform("timestep"))
        timestep = sigma * TRAINING_STEPS
        if not self.exact_upstream:
            return timestep, sigma
        rounded = timestep.to(torch.bfloat16).float()
        return rounded, scheduler.sigma(rounded)


def mean_where(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (B,) of values (B, C, h, w), each place counted as much as `mask` (B, 1, h, w) says."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.float().expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1)


FlowMatchSFTLoss = FlowMatchSFT()  # with the original's timesteps and weighting, called like a function
