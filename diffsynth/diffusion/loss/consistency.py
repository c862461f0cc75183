"""Consistency on the teacher's path: from two neighbouring points of it, the student jumps to one and the same place.

Song et al. 2023, "Consistency Models", Algorithm 2 (https://arxiv.org/abs/2303.01469).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..distillation.context import LossContext
from ..distillation.roles import STUDENT, TEACHER
from ..flow_match import interpolate, per_sample
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class Consistency(RoleDistillation):
    """mean ‖f_θ(x_t, t → s) - sg f_θ(x̂_t', t' → s)‖² / (t - s)² with jumps f_θ(x_t, t → s) = x_t + (s - t) v_θ(x_t, t).

    The weight (λ(t) of Song et al. 2023, Eq. 7) makes errors count as those of velocities: with 1 in its place hardly
    anything holds the low noise levels, on whose jumps all others build.

    x_t = (1 - t) x₀ + t ε, and x̂_t' = x_t + (t' - t) v_teacher(x_t, t) is one guided Euler step of the teacher from
    there. The edges of segments are noise levels that no jump and no step crosses: s is the nearest edge below t, and
    s ≤ t' < t. At t' = s the target is x̂_s itself, whatever the student predicts there.

    The target's network is the student without gradient rather than its average: Song & Dhariwal 2023, §3.2
    (https://arxiv.org/abs/2310.14189), who train without a teacher; Luo et al. 2023, "LCM-LoRA"
    (https://arxiv.org/abs/2311.05556), distil so.

    Args:
        grid_steps: The teacher's steps go from level to level of the family's grid of so many, and of the edges.
    """

    grid_steps: int = 50

    def __post_init__(self):
        super().__post_init__()
        if self.grid_steps < self.most_segments:
            raise ValueError(
                f"task.grid_steps is {self.grid_steps}; expected at least {self.most_segments}, one step of the "
                "teacher's for each segment."
            )

    @property
    def most_segments(self) -> int:
        """How many there are when there are most."""
        return 1

    def edges(self, pipe, size: Mapping, progress) -> Tensor:
        """Lower edges (k,) of the segments at a moment of the training, for pictures of `height` and `width`."""
        raise NotImplementedError(f"{type(self).__name__} has no segments.")

    def loss(self, context: LossContext) -> Tensor:
        levels, edges = (
            grid(context.pipe, context.size, self.grid_steps),
            self.edges(context.pipe, context.size, context.progress),
        )
        spans = spans_at(context.rng.uniform("timestep"), levels, edges)
        start, following, end = (level.to(context.clean.device) for level in spans)
        latents = interpolate(context.clean, context.rng.normal("noise", context.clean), start)
        with torch.no_grad():
            velocity = context.velocity(TEACHER, latents, start, self.guidance)
            point = jump(latents, velocity, start, following)
            target = jump(point, context.velocity(STUDENT, point, following), following, end)
        velocity = context.velocity(STUDENT, latents, start, trained=True)
        error = (jump(latents, velocity, start, end) - target).pow(2).flatten(1).mean(1)
        return error / (start - end) ** 2


class Spans(NamedTuple):
    """Noise levels (B,) on the teacher's path: `start` t > `following` t' ≥ `end` s."""

    start: Tensor
    following: Tensor
    end: Tensor


def spans_at(uniform: Tensor, levels: Tensor, edges: Tensor) -> Spans:
    """A level t for each of uniform numbers (B,) in [0, 1), the next lower one t' and the next lower edge s.

    Args:
        levels: Noise levels above 0, in any order.
        edges: Further levels, 0 among them; no step crosses one, since it ends there.
    """
    levels, edges = torch.cat([levels, edges]).unique(), edges.unique()  # both ascend
    index = 1 + (uniform * (len(levels) - 1)).long()
    start = levels[index]
    return Spans(start, levels[index - 1], edges[torch.searchsorted(edges, start) - 1])


def jump(latents: Tensor, velocity: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """x + (s - t) v (B, …): along the velocity from noise levels t to s, both (B,)."""
    return latents + per_sample(end - start, latents) * velocity


def grid(pipe, size: Mapping, steps: int, sigmas=None) -> Tensor:
    """Noise levels (steps,) at which the family draws pictures of `height` and `width`, or the `sigmas` instead."""
    with pipe.sampling_steps({**size, "num_inference_steps": steps, "sigmas": sigmas}) as scheduler:
        return scheduler.sigmas
