"""Adversarial distillation: a discriminator judges one step of the student, and the teacher's estimate is its target.

Sauer et al. 2023, "Adversarial Diffusion Distillation" (https://arxiv.org/abs/2311.17042), ADD; its discriminator is
that of Sauer et al. 2024 (https://arxiv.org/abs/2403.12015), LADD, on the teacher's features of renoised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.ranges import NonNegativeFloat
from ..adapters.lora import Adapter
from ..base_pipeline import BasePipeline
from ..distillation.context import LossContext
from ..distillation.discriminator import Discriminator, generator_hinge, hinge_loss
from ..distillation.roles import DISCRIMINATOR, STUDENT, TEACHER, Roles
from ..flow_match import clean_estimate, interpolate
from ..timesteps import LogitNormalTimesteps, UniformTimesteps
from ..trained import MODEL
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(RoleDistillation):
    """-D(x̂_θ) + λ c(t) mean ‖x̂_θ - sg(x̂_ψ(x_t, t))‖², x_t = (1 - t) x̂_θ + t ε' (ADD, Eq. 1, 2, 4).

    x̂_θ = x_s - s v_θ(x_s, s) is the student's one-step estimate of an image of the data set, noised to a level s; s is
    one of the student's own noise levels, all equally likely. x̂_ψ is the guided teacher's estimate of x̂_θ, noised to a
    level t. The weight c(t) is the paper's exponential one, α_t = 1 - t.

    Steps 0, 2, 4, … train the discriminator D instead, by hinge loss (Eq. 3, without R1), to tell x̂_θ from the
    `input_latents`; both are noised to a random level first.

    Args:
        discriminator: Settings of D.
        distillation_weight: λ; 2.5 is the paper's.
        timesteps: Distribution of t.
        renoising: Distribution of the noise levels of D's inputs.
    """

    discriminator: Discriminator = field(default_factory=Discriminator)
    distillation_weight: NonNegativeFloat = 2.5
    timesteps: UniformTimesteps | LogitNormalTimesteps = field(default_factory=UniformTimesteps)
    renoising: UniformTimesteps | LogitNormalTimesteps = field(default_factory=LogitNormalTimesteps)

    @property
    def reads_features(self) -> bool:
        return True

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        super().check(pipe, lora, cached)
        self.discriminator.heads(pipe.network, 0)  # raises if the network has no such layers

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, heads=self.discriminator.heads(pipe.network, seed), seed=seed)

    def trained_at(self, step: int) -> Sequence[str]:
        return (MODEL,) if step % 2 else (DISCRIMINATOR,)

    def learning_rate(self, role: str) -> float | None:
        return self.discriminator.learning_rate if role == DISCRIMINATOR else None

    def loss(self, context: LossContext) -> Tensor:
        sigma = self.renoising(context.pipe.scheduler, context.rng.uniform("renoising")).to(context.clean.device)
        noise = context.rng.normal("renoising noise", context.clean)
        if self.trains_student(context.progress):
            fake = self._student_estimate(context)
            logits = context.logits(TEACHER, interpolate(fake, noise, sigma), sigma)
            return generator_hinge(logits) + self.distillation_weight * self._distillation(context, fake)
        with torch.no_grad():
            fake = self._student_estimate(context)
        noisy = [interpolate(clean, noise, sigma) for clean in (context.clean, fake)]
        real, fake = (context.logits(TEACHER, latents, sigma, trained=True) for latents in noisy)
        return hinge_loss(real, fake)

    def _student_estimate(self, context: LossContext) -> Tensor:
        """x̂_θ (B, …) from the clean latents, each noised to a random one of the student's noise levels."""
        levels = context.sigmas(self.student.settings)
        sigma = levels[(context.rng.uniform("student step") * len(levels)).long().to(levels.device)]
        noisy = interpolate(context.clean, context.rng.normal("student noise", context.clean), sigma)
        return clean_estimate(noisy, context.velocity(STUDENT, noisy, sigma, trained=True), sigma)

    def _distillation(self, context: LossContext, fake: Tensor) -> Tensor:
        sigma = self.timesteps(context.pipe.scheduler, context.rng.uniform("timestep")).to(fake.device)
        with torch.no_grad():
            noisy = interpolate(fake, context.rng.normal("noise", fake), sigma)
            velocity = context.velocity(TEACHER, noisy, sigma, self.guidance)
        return (1 - sigma) * (fake - clean_estimate(noisy, velocity, sigma)).pow(2).flatten(1).mean(1)
