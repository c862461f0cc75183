"""Distribution matching distillation: the student's samples must have the distribution of the teacher's samples.

Yin et al. 2024, "Improved Distribution Matching Distillation" (https://arxiv.org/abs/2405.14867), DMD2; the gradient is
that of Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation" (https://arxiv.org/abs/2311.18828).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from ...core.ranges import NonNegativeFloat, PositiveFraction, at_least, within
from ..adapters.lora import Adapter
from ..base_pipeline import BasePipeline
from ..distillation.context import LossContext
from ..distillation.discriminator import Discriminator, generator_softplus, softplus_loss
from ..distillation.roles import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER, FakeScore, Roles, adapter_of
from ..flow_match import clean_estimate, interpolate, per_sample
from ..trained import MODEL
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class DMD2(RoleDistillation):
    """½ mean ‖x - sg(x - g)‖² with g = (x̂_fake - x̂_teacher) / mean |x - x̂_teacher| (DMD, Eq. 7).

    The gradient of the loss with respect to x is g / n, n being the number of x's elements. x is the student's clean
    estimate at one of its steps, chosen at random. It gets there from noise by its own earlier steps, as in sampling
    (backward simulation, DMD2 §4.5). x̂ = x_σ - σ v are the teacher's and the fake score's estimates of x from
    x_σ = (1 - σ) x + σ ε. The fake score is trained on the student's samples by flow matching,
    mean ‖v_fake(x_σ, σ) - (ε - x)‖² (DMD2 §4.2). Only the discriminator reads images of the data set.

    Args:
        student_every: One of `student_every` optimizer steps trains the student, the others train the fake score.
        fake_score: Settings of the network that is trained on the student's samples.
        min_sigma, max_sigma: σ is uniform between them; 0.02 and 0.98 are DMD's.
        discriminator: A discriminator on the fake score's features (DMD2 §4.3), whose real samples are the
            `input_latents`; None for none.
        adversarial_weight: Weight of the adversarial term in the student's loss; 0.03 is a guess.
    """

    student_every: Annotated[int, at_least(2)] = 5
    fake_score: FakeScore = field(default_factory=FakeScore)
    min_sigma: Annotated[float, within(0, 1, "()")] = 0.02
    max_sigma: PositiveFraction = 0.98
    discriminator: Discriminator | None = None
    adversarial_weight: NonNegativeFloat = 0.03

    def __post_init__(self):
        super().__post_init__()
        if self.student_every < 2:
            raise ValueError(
                f"task.student_every is {self.student_every}; expected at least 2, so that the other steps train the "
                "fake score."
            )
        if not 0 < self.min_sigma < self.max_sigma <= 1:
            raise ValueError(
                f"task.min_sigma={self.min_sigma} and task.max_sigma={self.max_sigma}; expected 0 < min < max <= 1."
            )

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        super().check(pipe, lora, cached)
        if self.fake_score.rank is not None and not self.fake_score.full:
            name = pipe.in_iteration_models[0]
            adapter = adapter_of(self.fake_score, lora, name)
            adapter.check_rank(pipe.network, adapter.targets(pipe, name), "task.fake_score.rank")

    @property
    def reads_features(self) -> bool:
        return self.discriminator is not None

    @property
    def reads_images(self) -> bool:
        return self.discriminator is not None

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        heads = self.discriminator and self.discriminator.heads(pipe.network, seed)
        return Roles(pipe, lora, self.fake_score, heads, seed)

    def trained_at(self, step: int) -> Sequence[str]:
        if step % self.student_every == 0:
            return (MODEL,)
        return (FAKE_SCORE, DISCRIMINATOR) if self.discriminator else (FAKE_SCORE,)

    def learning_rate(self, role: str) -> float | None:
        others = {FAKE_SCORE: self.fake_score, DISCRIMINATOR: self.discriminator}
        return others[role].learning_rate if role in others else None

    def loss(self, context: LossContext) -> Tensor:
        trains_student = self.trains_student(context.progress)
        with torch.set_grad_enabled(trains_student and torch.is_grad_enabled()):
            samples = self.sample_as_student(context)
        sigma = self.min_sigma + (self.max_sigma - self.min_sigma) * context.rng.uniform("matching").to(samples.device)
        noise = context.rng.normal("matching noise", samples)
        if trains_student:
            return self._student_loss(context, samples, sigma, noise)
        return self._fake_score_loss(context, samples, sigma, noise)

    def sample_as_student(self, context: LossContext) -> Tensor:
        """The student's clean estimates (B, …) at a random one of its steps; earlier steps have no gradient.

        Of the batch's clean latents only the shape is used.
        """
        sigmas, rng = context.sigmas(self.student.settings), context.rng
        last_steps = rng.integers("student step", len(sigmas))
        latents = rng.normal("noise", context.clean)
        last = torch.tensor(last_steps, device=latents.device)
        with torch.no_grad():
            for step in range(max(last_steps)):
                sigma, next_sigma = sigmas[step].expand(len(latents)), sigmas[step + 1].expand(len(latents))
                velocity = context.velocity(STUDENT, latents, sigma)
                moved = latents + per_sample(next_sigma - sigma, latents) * velocity
                if self.student.renoise:
                    clean = clean_estimate(latents, velocity, sigma)
                    moved = interpolate(clean, rng.normal(f"renoise {step}", latents), next_sigma)
                latents = torch.where(per_sample(step < last, latents), moved, latents)
        velocity = context.velocity(STUDENT, latents, sigmas[last], trained=True)
        return clean_estimate(latents, velocity, sigmas[last])

    def _student_loss(self, context: LossContext, samples: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        noisy = interpolate(samples, noise, sigma)
        with torch.no_grad():
            real = clean_estimate(noisy, context.velocity(TEACHER, noisy, sigma, self.guidance), sigma)
            fake = clean_estimate(noisy, context.velocity(FAKE_SCORE, noisy, sigma), sigma)
            gradient = matching_gradient(samples, real, fake)
        loss = 0.5 * (samples - (samples - gradient).detach()).pow(2).flatten(1).mean(1)
        if self.discriminator is None:
            return loss
        return loss + self.adversarial_weight * generator_softplus(context.logits(FAKE_SCORE, noisy, sigma))

    def _fake_score_loss(self, context: LossContext, samples: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        noisy = interpolate(samples, noise, sigma)
        velocity = context.velocity(FAKE_SCORE, noisy, sigma, trained=True)
        loss = (velocity - (noise - samples)).pow(2).flatten(1).mean(1)
        if self.discriminator is None:
            return loss
        real, fake = (
            context.logits(FAKE_SCORE, latents, sigma, trained=True)
            for latents in (interpolate(context.clean, noise, sigma), noisy)
        )
        return loss + softplus_loss(real, fake)


def matching_gradient(samples: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(x̂_fake - x̂_teacher) / mean |x - x̂_teacher| (B, …), the mean over each sample; DMD Eq. 7 and 8.

    Args:
        samples: The student's samples x (B, …).
        real, fake: The teacher's and the fake score's estimates x̂ (B, …) of them.
    """
    scale = (samples - real).abs().flatten(1).mean(1).clamp_min(1e-6)  # against division by 0; a guess
    return (fake - real) / per_sample(scale, samples)
