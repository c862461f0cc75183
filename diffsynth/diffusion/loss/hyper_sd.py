"""Trajectory-segmented consistency: within a segment of the teacher's path, the student jumps to its lower edge.

Ren et al. 2024, "Hyper-SD" (https://arxiv.org/abs/2404.13686), without its adversarial loss, its human feedback and its
score distillation for a single step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...core.ranges import SamplingSteps
from ..base_pipeline import BasePipeline
from ..trained import TrainProgress
from .consistency import Consistency, grid


@dataclass(frozen=True, kw_only=True)
class HyperSD(Consistency):
    """mean ‖f_θ(x_t, t → s) - sg f_θ(x̂_t', t' → s)‖² / (t - s)² (`Consistency`), s the lower edge of t's segment.

    The edges of k segments are the noise levels at which the student would sample in k steps, and 0. The number of
    segments decreases during the run, down to the student's number of steps.

    Args:
        segments: Numbers of segments, decreasing; each is used for an equal part of the run.
    """

    segments: Sequence[SamplingSteps] = (8, 4)
    grid_steps: SamplingSteps = 40

    def __post_init__(self):
        steps, segments = self.student.num_inference_steps, list(self.segments)
        if not segments or segments[-1] != steps or any(a <= b for a, b in pairwise(segments)):
            raise ValueError(
                f"task.segments is {segments}; expected decreasing numbers that end with "
                f"task.student.num_inference_steps, which is {steps}: the student takes one step per segment."
            )
        super().__post_init__()

    @property
    def max_segments(self) -> int:
        return self.segments[0]

    def segments_at(self, progress: TrainProgress | None) -> int:
        """The number of segments at this progress of the training; None is its end."""
        part = len(self.segments) - 1 if progress is None else progress.step * len(self.segments) // progress.steps
        return self.segments[min(part, len(self.segments) - 1)]

    def edges(self, pipe: BasePipeline, size: Mapping, progress: TrainProgress | None) -> list[float]:
        count = self.segments_at(progress)
        sigmas = self.student.settings["sigmas"] if count == self.student.num_inference_steps else None
        return [*grid(pipe, size, count, sigmas), 0.0]
