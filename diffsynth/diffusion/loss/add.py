"""Adversarial distillation: one step of the student is to look like a picture, and like what the teacher makes of it.

Sauer et al. 2023, "Adversarial Diffusion Distillation" (https://arxiv.org/abs/2311.17042), ADD; its discriminator is
that of Sauer et al. 2024 (https://arxiv.org/abs/2403.12015), LADD: on the teacher's own features of renoised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distillation.context import LossContext
from ..distillation.discriminator import Discriminator, generator_hinge, hinge_loss
from ..distillation.roles import DISCRIMINATOR, STUDENT, TEACHER, Roles
from ..flow_match import clean_estimate, interpolate
from ..timesteps import LogitNormalTimesteps, UniformTimesteps
from .base import MODEL
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(RoleDistillation):
    """-D(x̂_θ) + λ c(t) mean ‖x̂_θ - sg(x̂_ψ(x_t, t))‖², x_t = (1 - t) x̂_θ + t ε' (ADD, Eq. 1, 2, 4).

    x̂_θ = x_s - s v_θ(x_s, s) is what the student makes, in one step, of the data set's pictures at one of its own noise
    levels s, which are equally likely; x̂_ψ what the guided teacher makes of that. Of the paper's weightings c(t) is the
    exponential one, α_t = 1 - t. Every other step, the first among them, trains the discriminator D instead, by hinge
    loss (Eq. 3, without R1), to tell x̂_θ from the `input_latents`; it sees either at a random noise level.

    Args:
        distillation_weight: λ.
        timesteps: t of the distillation term.
        renoising: Noise levels that the discriminator sees.
    """

    discriminator: Discriminator = field(default_factory=Discriminator)
    distillation_weight: float = 2.5
    timesteps: UniformTimesteps | LogitNormalTimesteps = field(default_factory=UniformTimesteps)
    renoising: UniformTimesteps | LogitNormalTimesteps = field(default_factory=LogitNormalTimesteps)

    @property
    def reads_features(self) -> bool:
        return True

    def check(self, pipe, lora, cached: bool) -> None:
        super().check(pipe, lora, cached)
        self.discriminator.heads(pipe.network, 0)

    def build_roles(self, pipe, lora, seed: int) -> Roles:
        return Roles(pipe, lora, heads=self.discriminator.heads(pipe.network, seed), seed=seed)

    def trained_at(self, step: int) -> Sequence[str]:
        return (MODEL,) if step % 2 else (DISCRIMINATOR,)

    def learning_rate(self, role: str) -> float | None:
        return self.discriminator.learning_rate if role == DISCRIMINATOR else None

    def loss(self, context: LossContext) -> Tensor:
        sigma = self.renoising(context.pipe.scheduler, context.rng.uniform("renoising")).to(context.clean.device)
        noise = context.rng.normal("renoising noise", context.clean)
        if self.trains_student(context.progress):
            fake = self._made_by_student(context)
            seen = context.logits(TEACHER, interpolate(fake, noise, sigma), sigma)
            return generator_hinge(seen) + self.distillation_weight * self._distillation(context, fake)
        with torch.no_grad():
            fake = self._made_by_student(context)
        noisy = [interpolate(clean, noise, sigma) for clean in (context.clean, fake)]
        return hinge_loss(*(context.logits(TEACHER, each, sigma, trained=True) for each in noisy))

    def _made_by_student(self, context: LossContext) -> Tensor:
        """x̂_θ (B, …) of the pictures, each noised to one of the student's noise levels."""
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
