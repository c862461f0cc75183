"""How teacher and student of a distillation draw, and the unit that draws as the teacher does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..pipeline.units import PipelineUnit, in_groups


@dataclass(frozen=True, kw_only=True)
class Student:
    """How the student draws: in few steps, without guidance.

    Args:
        num_inference_steps: How many.
        sigmas: Noise levels instead of the family's own, decreasing from 1.
        renoise: Draw fresh noise at each step instead of following the path.
    """

    num_inference_steps: int = 4
    sigmas: Sequence[float] | None = None
    renoise: bool = False

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"task.student.num_inference_steps is {self.num_inference_steps}; expected at least 1.")
        if self.sigmas is None:
            return
        falling = all(a > b for a, b in pairwise([*self.sigmas, 0]))
        if len(self.sigmas) != self.num_inference_steps or self.sigmas[0] != 1 or not falling:
            raise ValueError(
                f"task.student.sigmas is {list(self.sigmas)}; expected {self.num_inference_steps} noise levels, as "
                "many as num_inference_steps, that fall from 1 and stay above 0."
            )

    @property
    def settings(self) -> dict:
        """Arguments of the pipeline; they travel with the weights."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "cfg_scale": 1,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "sampler": "renoise" if self.renoise else "euler",
        }


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """How the pictures that a student learns from are drawn.

    Args:
        cfg_scale: Of classifier-free guidance against `negative_prompt`.
    """

    num_inference_steps: int = 40
    cfg_scale: float = 4.0
    negative_prompt: str = ""

    @property
    def settings(self) -> dict:
        """Arguments of the pipeline."""
        names = ("num_inference_steps", "cfg_scale", "negative_prompt")
        return {**{name: getattr(self, name) for name in names}, "sampler": "euler"}


class TeacherSampler(PipelineUnit):
    """The teacher's picture of a prompt and seed, as latents, and the noise that it was drawn from.

    It calls the base as it was released, so that what it makes can be kept although the base is being trained.

    Args:
        student: Its noise levels are where `trajectory` (1, K + 1, C, h, w) passes; None keeps the ends only.
    """

    calls_released_weights = True

    def __init__(self, pipe, teacher: Teacher, student: Student | None = None):
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
        """Pictures of one size are drawn together."""
        kinds = [(each["height"], each["width"], each["rand_device"]) for each in batch]
        return in_groups(batch, kinds, partial(self._draw, pipe))

    @torch.no_grad()
    def _draw(self, pipe, alike: Sequence[Mapping]) -> list[dict]:
        requests = [{**self.teacher, **each} for each in alike]
        levels = self._levels(pipe, alike[0])
        with pipe.sampling():
            pipe.progress_bar = iter
            path = pipe.trajectory(*pipe.prepare(requests))
            sigmas = [*pipe.scheduler.sigmas.tolist(), 0.0]
            points = points_on_path(path, sigmas, [sigmas[0], *levels, 0.0])
        noise, *trajectory, end = (point.split(1) for point in points)
        made = [{"latents": a, "input_latents": b} for a, b in zip(noise, end, strict=True)]
        if self.student is None:
            return made
        whole = torch.stack([torch.cat(point) for point in (*trajectory, end)], dim=1).split(1)
        return [{**each, "trajectory": own} for each, own in zip(made, whole, strict=True)]

    def _levels(self, pipe, size: Mapping) -> list[float]:
        if self.student is None:
            return []
        with pipe.sampling_steps({"height": size["height"], "width": size["width"], **self.student}) as scheduler:
            return scheduler.sigmas.tolist()


def points_on_path(path: Iterable[Tensor], sigmas: Sequence[float], wanted: Sequence[float]) -> list[Tensor]:
    """Where a path of straight lines is at noise levels `wanted`, of which it has passed `sigmas`; both decrease."""
    points, left = [], list(wanted)
    for (start, high), (end, low) in pairwise(zip(path, sigmas, strict=True)):
        while left and left[0] >= low:
            points.append(torch.lerp(start, end, (high - min(left.pop(0), high)) / (high - low)))  # exact at both ends
    return points
