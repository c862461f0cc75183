"""DiffusionNFT: the policy moves towards its better samples and away from its worse ones.

Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process"
(https://arxiv.org/abs/2509.16117), Eq. 5, and its published code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ....core.ranges import NonNegativeFloat, PositiveFloat, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...distillation.context import LossContext
from ...distillation.roles import OLD, STUDENT, TEACHER, Roles
from ...flow_match import clean_estimate
from ...noted import note
from .base import RenoisingObjective

SMALLEST_WEIGHT = 1e-5  # of the published code

# d of the role `old` after n optimizer steps, the schedules of the published code.
SCHEDULES = {
    "copy": lambda n: 0.0,
    "linear": lambda n: min(0.001 * n, 0.5),
    "delayed": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
}


@dataclass(frozen=True, kw_only=True)
class NFT(RenoisingObjective):
    """(A_max / β) · [r D(v⁺) + (1 - r) D(v⁻)] + λ D(v_θ; x̂₀ of the base), with r = ½ + A / (2 A_max).

    v⁺ = β v_θ + (1 - β) v_old and v⁻ = (1 + β) v_old - β v_θ are predictions for x_σ = (1 - σ) x₀ + σ ε, and
    D(v) = mean (x̂₀ - x₀)² / w with x̂₀ = x_σ - σ v and w = mean |x̂₀ - x₀|, without gradient. At v_θ = v_old the
    gradient is A ∇D(v_θ), whatever β. λ is a temperature in units of the normalised reward: without it, nothing holds
    the policy to the base. A = advantage, cut to ±A_max.

    Args:
        beta: β; smaller ones extrapolate more from the old policy, and leave the data sooner.
        largest_advantage: A_max.
        kl: λ.
        adaptive_weight: Whether w divides; False takes w = 1.
        schedule: How `old`, which samples, follows the policy before each round: `copy` takes its weights, `linear`
            averages up to d = 0.5 after 500 steps, `delayed` copies for 75 steps, then up to d = 0.999.
    """

    beta: PositiveFloat = 1.0
    largest_advantage: PositiveFloat = 5.0
    kl: NonNegativeFloat = 0.1
    adaptive_weight: bool = True
    schedule: Literal["copy", "linear", "delayed"] = "linear"

    samples_as: ClassVar[str] = OLD

    def __post_init__(self):
        check_fields(self, "task.")

    def decay(self, step: int) -> float:
        return SCHEDULES[self.schedule](step)

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed, keeps_old=True)

    def loss(self, context: LossContext, advantage: Tensor) -> Tensor:
        noisy, _, sigma = self.noised(context)
        with torch.no_grad():
            old = context.velocity(OLD, noisy, sigma)
            base = context.velocity(TEACHER, noisy, sigma) if self.kl else None
        own = context.velocity(STUDENT, noisy, sigma, trained=True)
        share = 0.5 + advantage.clamp(-self.largest_advantage, self.largest_advantage) / (2 * self.largest_advantage)
        ahead = self.beta * own + (1 - self.beta) * old
        behind = (1 + self.beta) * old - self.beta * own
        better, worse = (self._distance(noisy, each, sigma, context.clean) for each in (ahead, behind))
        loss = (self.largest_advantage / self.beta) * (share * better + (1 - share) * worse)
        note("old_distance", (own - old).detach().pow(2).flatten(1).mean(1))
        if base is None:
            return loss
        estimate = clean_estimate(noisy, own, sigma)
        apart = (estimate - clean_estimate(noisy, base, sigma)).pow(2).flatten(1).mean(1)
        note("kl", apart)
        return loss + self.kl * apart / self._weight(estimate, context.clean)

    def _distance(self, noisy: Tensor, velocity: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
        """D(v) (B,) of velocities (B, …)."""
        estimate = clean_estimate(noisy, velocity, sigma)
        return (estimate - clean).pow(2).flatten(1).mean(1) / self._weight(estimate, clean)

    def _weight(self, estimate: Tensor, clean: Tensor) -> Tensor:
        """w (B,) of clean estimates (B, …), in double precision, without gradient; 1 without adaptive weights."""
        if not self.adaptive_weight:
            return estimate.new_ones(len(estimate))
        apart = (estimate.detach().double() - clean.double()).abs().flatten(1).mean(1)
        return apart.clamp_min(SMALLEST_WEIGHT).to(estimate.dtype)
