"""The unit that samples with a distillation's teacher: images for prompts and seeds, and the path that leads there."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pipeline.units import PipelineUnit, in_groups
from .settings import Student, Teacher

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


class TeacherSampler(PipelineUnit):
    """Samples with the teacher: `input_latents` for a prompt and seed, and `latents`, the noise they were made from.

    It calls the released weights of the base, so that its outputs can be cached although the base is trained.

    Args:
        student: Also return `trajectory` (1, K + 1, C, h, w): the teacher's latents at each of this student's K noise
            levels and at 0. None returns none.
    """

    calls_released_weights = True

    def __init__(self, pipe: "BasePipeline", teacher: Teacher, student: Student | None = None):
        models = pipe.models_of(pipe.units, model_fn=True) - set(pipe.decoding_models)
        super().__init__(
            input_params_posi={"prompt": "prompt"},
            output_params=("latents", "input_latents", *(("trajectory",) if student else ())),
            onload_model_names=sorted(models),
        )
        self.teacher, self.student = teacher.settings, student and student.settings

    def process(self, pipe, prompt, seed, rand_device, height, width):
        inputs = {"prompt": prompt, "seed": seed, "rand_device": rand_device, "height": height, "width": width}
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe, batch):
        """Sample images of equal size as one batch."""
        kinds = [(each["height"], each["width"], each["rand_device"]) for each in batch]
        return in_groups(batch, kinds, partial(self._sample, pipe))

    @torch.no_grad()
    def _sample(self, pipe: "BasePipeline", group: Sequence[Mapping]) -> list[dict]:
        requests = [{**self.teacher, **inputs} for inputs in group]
        levels = self._student_levels(pipe, group[0])
        with pipe.sampling():
            path = pipe.trajectory(*pipe.prepare(requests))
            sigmas = pipe.scheduler.levels
            points = points_on_path(path, sigmas, [sigmas[0], *levels, 0.0])
        noise, *between, end = (point.split(1) for point in points)
        outputs = [{"latents": a, "input_latents": b} for a, b in zip(noise, end, strict=True)]
        if self.student is None:
            return outputs
        trajectories = torch.stack([torch.cat(point) for point in (*between, end)], dim=1).split(1)
        return [{**ends, "trajectory": whole} for ends, whole in zip(outputs, trajectories, strict=True)]

    def _student_levels(self, pipe: "BasePipeline", size: Mapping) -> list[float]:
        if self.student is None:
            return []
        with pipe.sampling_steps({"height": size["height"], "width": size["width"], **self.student}) as scheduler:
            return scheduler.levels[:-1]


def points_on_path(path: Iterable[Tensor], sigmas: Sequence[float], wanted: Sequence[float]) -> list[Tensor]:
    """The points (B, …) of a piecewise linear path at the noise levels `wanted`.

    Args:
        path: The path's corners (B, …), at the noise levels `sigmas`.
        sigmas, wanted: Decreasing noise levels.
    """
    points, remaining = [], list(wanted)
    for (start, high), (end, low) in pairwise(zip(path, sigmas, strict=True)):
        while remaining and remaining[0] >= low:
            fraction = (high - min(remaining.pop(0), high)) / (high - low)
            points.append(torch.lerp(start, end, fraction))  # exact at both ends
    return points
