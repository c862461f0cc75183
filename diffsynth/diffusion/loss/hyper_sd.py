"""Trajectory-segmented consistency: within each segment of the teacher's path, all points lead to its lower edge.

Ren et al. 2024, "Hyper-SD" (https://arxiv.org/abs/2404.13686), without its adversarial loss, without its stage of
human feedback and without its score distillation for a single step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .consistency import Consistency, grid


@dataclass(frozen=True, kw_only=True)
class HyperSD(Consistency):
    """mean ‖f_θ(x_t, t → s) - sg f_θ(x̂_t', t' → s)‖² / (t - s)² (`Consistency`), s the lower edge of t's segment.

    k segments lie between the noise levels that the student would draw at in k steps, and 0. They grow fewer, each
    number for an equal part of the run, down to the student's own steps.

    Args:
        segments: How many, part after part.
    """

    segments: Sequence[int] = (8, 4)
    grid_steps: int = 40

    def __post_init__(self):
        steps, segments = self.student.num_inference_steps, list(self.segments)
        if not segments or segments[-1] != steps or any(a <= b for a, b in pairwise(segments)):
            raise ValueError(
                f"task.segments is {segments}; expected numbers falling to task.student.num_inference_steps, {steps}; "
                "the student takes one step a segment."
            )
        super().__post_init__()

    @property
    def most_segments(self) -> int:
        return self.segments[0]

    def segments_at(self, progress) -> int:
        """How many there are at a `TrainProgress`; None is the end."""
        part = len(self.segments) - 1 if progress is None else progress.step * len(self.segments) // progress.steps
        return self.segments[min(part, len(self.segments) - 1)]

    def edges(self, pipe, size: Mapping, progress) -> Tensor:
        count = self.segments_at(progress)
        sigmas = self.student.settings["sigmas"] if count == self.student.num_inference_steps else None
        return torch.cat([grid(pipe, size, count, sigmas), torch.zeros(1)])
