"""Distribution matching: what the student draws is to be as likely under the teacher as what the teacher draws.

Yin et al. 2024, "Improved Distribution Matching Distillation" (https://arxiv.org/abs/2405.14867), DMD2; the gradient is
that of Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation" (https://arxiv.org/abs/2311.18828).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distillation.context import LossContext
from ..distillation.discriminator import Discriminator, generator_softplus, softplus_loss
from ..distillation.roles import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER, FakeScore, Roles
from ..flow_match import clean_estimate, interpolate, per_sample
from .base import MODEL
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class DMD2(RoleDistillation):
    """½ mean ‖x - sg(x - g)‖², g = (x̂_fake - x̂_teacher) / mean |x - x̂_teacher|, which hands x g / n (DMD, Eq. 7).

    x is what the student draws at one of its steps, chosen at random, coming there from noise by its own earlier steps,
    as when it is sampled (backward simulation, DMD2 §4.5); x̂ = x_σ - σ v are the teacher's and the fake score's
    estimates of x from x_σ = (1 - σ) x + σ ε. The fake score meanwhile learns the student's drawings by flow matching,
    mean ‖v_fake(x_σ, σ) - (ε - x)‖² (DMD2 §4.2). No picture is needed, but for the discriminator.

    Args:
        student_every: Each so many optimizer steps one trains the student, the others the fake score.
        fake_score: Who learns what the student draws.
        min_sigma, max_sigma: Where σ is drawn from, uniformly.
        discriminator: A GAN on the fake score's features (DMD2 §4.3), whose real samples are the `input_latents`.
        adversarial_weight: Of that GAN in the student's loss.
    """

    student_every: int = 5
    fake_score: FakeScore = field(default_factory=FakeScore)
    min_sigma: float = 0.02
    max_sigma: float = 0.98
    discriminator: Discriminator | None = None
    adversarial_weight: float = 0.03

    def __post_init__(self):
        super().__post_init__()
        if self.student_every < 2:
            raise ValueError(f"task.student_every is {self.student_every}; expected at least 2, or no step is left.")
        if not 0 < self.min_sigma < self.max_sigma <= 1:
            raise ValueError(
                f"task.min_sigma={self.min_sigma} and task.max_sigma={self.max_sigma}; expected 0 < min < max <= 1."
            )

    @property
    def reads_features(self) -> bool:
        return self.discriminator is not None

    def build_roles(self, pipe, lora, seed: int) -> Roles:
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
            drawn = self.sample_as_student(context)
        sigma = self.min_sigma + (self.max_sigma - self.min_sigma) * context.rng.uniform("matching").to(drawn.device)
        noise = context.rng.normal("matching noise", drawn)
        if trains_student:
            return self._student_loss(context, drawn, sigma, noise)
        return self._fake_score_loss(context, drawn, sigma, noise)

    def sample_as_student(self, context: LossContext) -> Tensor:
        """Clean x̂ (B, …) that the student sees at a random one of its steps, the steps before taken without gradient.

        Of the scene's pictures only the shape counts.
        """
        sigmas, rng = context.sigmas(self.student.settings), context.rng
        last = (rng.uniform("student step") * len(sigmas)).long()
        latents, before = rng.normal("noise", context.clean), int(last.max())
        last = last.to(latents.device)
        with torch.no_grad():
            for step in range(before):
                sigma, following = sigmas[step].expand(len(latents)), sigmas[step + 1].expand(len(latents))
                velocity = context.velocity(STUDENT, latents, sigma)
                moved = latents + per_sample(following - sigma, latents) * velocity
                if self.student.renoise:
                    clean = clean_estimate(latents, velocity, sigma)
                    moved = interpolate(clean, rng.normal(f"renoise {step}", latents), following)
                latents = torch.where(per_sample(step < last, latents), moved, latents)
        velocity = context.velocity(STUDENT, latents, sigmas[last], trained=True)
        return clean_estimate(latents, velocity, sigmas[last])

    def _student_loss(self, context: LossContext, drawn: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        noisy = interpolate(drawn, noise, sigma)
        with torch.no_grad():
            real = context.velocity(TEACHER, noisy, sigma, self.guidance)
            fake = context.velocity(FAKE_SCORE, noisy, sigma)
            gradient = matching_gradient(drawn, clean_estimate(noisy, real, sigma), clean_estimate(noisy, fake, sigma))
        loss = 0.5 * (drawn - (drawn - gradient).detach()).pow(2).flatten(1).mean(1)
        if self.discriminator is None:
            return loss
        return loss + self.adversarial_weight * generator_softplus(context.logits(FAKE_SCORE, noisy, sigma))

    def _fake_score_loss(self, context: LossContext, drawn: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        noisy = interpolate(drawn, noise, sigma)
        velocity = context.velocity(FAKE_SCORE, noisy, sigma, trained=True)
        loss = (velocity - (noise - drawn)).pow(2).flatten(1).mean(1)
        if self.discriminator is None:
            return loss
        sides = (interpolate(context.clean, noise, sigma), noisy)
        return loss + softplus_loss(*(context.logits(FAKE_SCORE, side, sigma, trained=True) for side in sides))


def matching_gradient(drawn: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(x̂_fake - x̂_teacher) / mean |x - x̂_teacher|, the mean over each sample; DMD Eq. 7 and 8 (all (B, …))."""
    scale = (drawn - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / per_sample(scale, drawn)
