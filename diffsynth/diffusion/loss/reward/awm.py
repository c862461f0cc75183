"""Advantage-weighted matching: flow matching on the policy's own samples, weighted by their advantages.

Xue et al. 2025, "Advantage Weighted Matching" (https://arxiv.org/abs/2509.25050).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....core.ranges import NonNegativeFloat, PositiveFraction, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...distillation.context import LossContext
from ...distillation.roles import OLD, STUDENT, TEACHER, Roles
from ...noted import note
from ...timesteps import UniformWeighting
from .base import RenoisingObjective


@dataclass(frozen=True, kw_only=True)
class AWM(RenoisingObjective):
    """w(σ) · [A ‖v_θ - (ε - x₀)‖² + λ ‖v_θ - v_base‖² + λ' ‖v_θ - v_old‖²], means over the dimensions.

    The policy samples. `old` is a moving average of it, from which one round must not lead far: without that term the
    published training collapses. On-policy, λ is the temperature: p ∝ p_base exp(A / λ) for Gaussians. The paper's
    ratio of probabilities is 1 with one update a round, and left out.

    Args:
        weighting: w(σ).
        kl: λ, the pull to the base.
        kl_old: λ', the pull to the moving average; 0 keeps none.
        old_decay: The share of the average that stays, per round, at most; it begins at 0 and reaches this in 100
            optimizer steps.
    """

    weighting: UniformWeighting = field(default_factory=UniformWeighting)
    kl: NonNegativeFloat = 0.1
    kl_old: NonNegativeFloat = 1.0
    old_decay: PositiveFraction = 0.3

    def __post_init__(self):
        check_fields(self, "task.")

    def decay(self, step: int) -> float | None:
        return min(step / 100, 1) * self.old_decay if self.kl_old else None

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed, keeps_old=self.kl_old > 0)

    def loss(self, context: LossContext, advantage: Tensor) -> Tensor:
        noisy, noise, sigma = self.noised(context)
        pulls = {TEACHER: self.kl, OLD: self.kl_old}
        with torch.no_grad():
            others = {role: context.velocity(role, noisy, sigma) for role, strength in pulls.items() if strength}
        own = context.velocity(STUDENT, noisy, sigma, trained=True)
        loss = advantage * _square_error(own, noise - context.clean)
        for role, velocity in others.items():
            apart = _square_error(own, velocity)
            note("kl" if role == TEACHER else "old_distance", apart)
            loss = loss + pulls[role] * apart
        return loss * self.weighting(context.pipe.scheduler, sigma).to(loss.device)


def _square_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean square (B,) over the dimensions of the difference of velocities (B, …)."""
    return (velocity - target).pow(2).flatten(1).mean(1)
