"""Reward-weighted regression: flow matching on the policy's own samples, the better ones with more weight.

Peters & Schaal 2007, "Reinforcement Learning by Reward-weighted Regression"; its only minimiser is the tilted
distribution p ∝ p_policy exp(A / τ), so that other objectives are measured against it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.ranges import PositiveFloat, check_fields
from ...distillation.context import LossContext
from .base import RenoisingObjective


@dataclass(frozen=True, kw_only=True)
class RWR(RenoisingObjective):
    """W ‖v_θ - (ε - x₀)‖², the mean over the dimensions, with W = exp(A / τ) / mean of it over the prompt's samples.

    Args:
        temperature: τ, in units of the normalised reward; lower ones learn from fewer samples.
    """

    temperature: PositiveFloat = 1.0

    def __post_init__(self):
        check_fields(self, "task.")

    def advantages(self, normalised: Tensor) -> Tensor:
        scored = ~normalised.isnan()
        logits = torch.where(scored, normalised / self.temperature, -torch.inf)
        weights = torch.softmax(logits, dim=1) * scored.sum(1, keepdim=True)
        return weights.nan_to_num(0)  # of a prompt without a sample that could be scored

    def loss(self, context: LossContext, advantage: Tensor) -> Tensor:
        noisy, noise, sigma = self.noised(context)
        velocity = self.policy_velocity(context, noisy, sigma)
        return advantage * (velocity - (noise - context.clean)).pow(2).flatten(1).mean(1)
