"""Consistency distillation: from two neighbouring points of the teacher's path, the student must jump to one point.

Song et al. 2023, "Consistency Models", Algorithm 2 (https://arxiv.org/abs/2303.01469).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.ranges import SamplingSteps
from ..base_pipeline import BasePipeline
from ..distillation.context import LossContext
from ..distillation.roles import STUDENT, TEACHER
from ..flow_match import interpolate, per_sample
from ..trained import TrainProgress
from .distillation import RoleDistillation


@dataclass(frozen=True, kw_only=True)
class Consistency(RoleDistillation):
    """mean ‖f_θ(x_t, t → s) - sg f_θ(x̂_t', t' → s)‖² / (t - s)² with jumps f_θ(x_t, t → s) = x_t + (s - t) v_θ(x_t, t).

    x_t = (1 - t) x₀ + t ε, and x̂_t' = x_t + (t' - t) v_teacher(x_t, t) is one guided Euler step of the teacher from
    there. The path is cut into segments. Their edges are noise levels that no jump and no step crosses: s is the
    nearest edge below t, and s ≤ t' < t. At t' = s the target is x̂_s itself, whatever the student predicts there.

    The weight 1 / (t - s)² (λ(t) of Song et al. 2023, Eq. 7) makes the error one of velocities. With weight 1 the low
    noise levels would hardly be trained, and the targets of all other levels depend on them.

    The target's network is the student without gradient, not an average of its weights: Song & Dhariwal 2023, §3.2
    (https://arxiv.org/abs/2310.14189), who train without a teacher; Luo et al. 2023, "LCM-LoRA"
    (https://arxiv.org/abs/2311.05556), who distil.

    Args:
        grid_steps: The teacher steps between neighbouring noise levels of the family's grid of `grid_steps` steps,
            to which the edges are added.
    """

    grid_steps: SamplingSteps = 50

    def __post_init__(self):
        super().__post_init__()
        if self.grid_steps < self.max_segments:
            raise ValueError(
                f"task.grid_steps is {self.grid_steps}; expected at least {self.max_segments}, because the teacher "
                "takes at least one step in each segment."
            )

    @property
    def max_segments(self) -> int:
        """The largest number of segments during the training."""
        return 1

    def edges(self, pipe: BasePipeline, size: Mapping, progress: TrainProgress | None) -> list[float]:
        """Lower edges of the segments at this progress of the training, for images of `height` and `width`."""
        raise NotImplementedError(f"{type(self).__name__} has no segments.")

    def loss(self, context: LossContext) -> Tensor:
        levels = grid(context.pipe, context.size, self.grid_steps)
        edges = self.edges(context.pipe, context.size, context.progress)
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
    """Noise levels (B,) of the jumps: `start` t > `following` t' ≥ `end` s."""

    start: Tensor
    following: Tensor
    end: Tensor


def spans_at(uniform: Tensor, levels: Sequence[float], edges: Sequence[float]) -> Spans:
    """A random level t per sample, the next lower level t' and the next lower edge s.

    Args:
        uniform: Uniform random numbers (B,) in [0, 1).
        levels: Noise levels above 0, in any order.
        edges: Lower edges of the segments, in any order, among them 0; they become levels too.
    """
    levels, edges = (torch.from_numpy(np.unique(np.float32(numbers))) for numbers in ([*levels, *edges], edges))
    index = 1 + (uniform * (len(levels) - 1)).long()
    start = levels[index]
    return Spans(start, levels[index - 1], edges[torch.searchsorted(edges, start) - 1])


def jump(latents: Tensor, velocity: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Move latents (B, …) along the velocity (B, …) from noise levels t to s, both (B,): x + (s - t) v."""
    return latents + per_sample(end - start, latents) * velocity


def grid(pipe: BasePipeline, size: Mapping, steps: int, sigmas: Sequence[float] | None = None) -> list[float]:
    """The `steps` noise levels at which the family samples images of `height` and `width`, or the given `sigmas`."""
    with pipe.sampling_steps({**size, "num_inference_steps": steps, "sigmas": sigmas}) as scheduler:
        return scheduler.levels[:-1]
