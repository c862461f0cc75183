"""What objectives share whose student learns to draw in few steps."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..distillation.context import LossContext
from ..distillation.roles import Roles
from ..distillation.teacher import Student, Teacher, TeacherSampler
from ..pipeline.units import required_units
from ..randomness import GlobalRNG
from ..trained import TrainProgress
from .base import MODEL, Objective


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """A student of few steps.

    Args:
        student: How it draws, in training and afterwards; these settings travel with its weights.
        teacher: How `make_cache.py` draws the pictures it learns from; None where the data set's pictures are these.
    """

    student: Student = field(default_factory=Student)
    teacher: Teacher | None = None

    optional_columns: ClassVar[Sequence[str]] = ("rand_device",)
    keeps_trajectory: ClassVar[bool] = False  # whether it reads what the teacher passed on its way

    def __post_init__(self):
        steps, most = self.student.num_inference_steps, self.teacher and self.teacher.num_inference_steps
        if most and steps > most:
            raise ValueError(
                f"task.student.num_inference_steps is {steps}, more than the teacher's {most} "
                "(task.teacher.num_inference_steps); a student draws in fewer."
            )

    @property
    def guidance(self) -> float:
        """Scale of the teacher's guidance."""
        return 1 if self.teacher is None else self.teacher.cfg_scale

    @property
    def negative_prompt(self) -> str:
        return "" if self.teacher is None else self.teacher.negative_prompt

    @property
    def reads_negative(self) -> bool:
        return self.guidance != 1

    @property
    def keeps_images(self) -> bool:
        return self.teacher is None and "seed" in self.extra_inputs

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self.student.settings

    @property
    def columns(self) -> tuple[str, ...]:
        seed = () if self.teacher is None else ("seed",)
        return tuple(dict.fromkeys([*self.extra_inputs, *seed]))

    def units(self, pipe) -> list:
        """The teacher's drawing takes the place of the unit that encodes pictures."""
        if self.teacher is None:
            return super().units(pipe)
        drawing = TeacherSampler(pipe, self.teacher, self.student if self.keeps_trajectory else None)
        others = [unit for unit in pipe.units if not set(unit.output_params) & set(drawing.output_params)]
        return required_units([*others, drawing], self.wanted_inputs(pipe))

    def wanted_inputs(self, pipe) -> set[str]:
        """The same for all methods, so that they share their teacher's pictures."""
        return super().wanted_inputs(pipe) | {"latents", "input_latents", "height", "width"}

    def sampling_inputs(self, pipe) -> dict[str, Any]:
        """What `model_fn` is told of itself, such as an embedded guidance scale."""
        named = inspect.signature(pipe.model_fn).parameters.keys() & pipe.call_defaults.keys()
        return {name: pipe.call_defaults[name] for name in sorted(named) if pipe.call_defaults[name] is not None}

    def check_row(self, row) -> None:
        if float(row.get("cfg_scale", 1)) != 1:
            raise ValueError(
                f"cfg_scale is {row['cfg_scale']}; the student draws without guidance, which its teacher's pictures "
                "hold already: write 1 into that column."
            )
        found, own = row.get("num_inference_steps"), self.student.num_inference_steps
        if found is not None and int(found) != own:
            raise ValueError(
                f"num_inference_steps is {found}, task.student.num_inference_steps {own}; set this to what the column "
                "says: it travels with the student."
            )

    def check(self, pipe, lora, cached: bool) -> None:
        network = pipe.in_iteration_models[0]
        trained = {*(lora.models if lora else ()), *(name.split(".")[0] for name in self.trainable_models or ())}
        if trained - {network}:
            raise ValueError(
                f"A distillation trains {network} alone, as teacher and student read the same; not {sorted(trained)}."
            )
        if self.teacher and not cached:
            raise ValueError(
                "The teacher's pictures are not there: make them with `make_cache.py` and the same model, task and "
                "dataset, then train with dataset=cache; or choose teacher=none where the pictures in the data set "
                "are the teacher's."
            )
        if self.teacher and lora and lora.preset:
            raise ValueError(
                f"lora.preset={lora.preset} would be merged into the student, but the teacher has drawn without it; "
                "merge it into the base first (fuse.py), and make the teacher's pictures with that."
            )


@dataclass(frozen=True, kw_only=True)
class RoleDistillation(Distillation):
    """A student whose teacher, and perhaps further roles, predict in training.

    Args:
        guidance: Scale of the teacher's classifier-free guidance in training; 1 is none.
        negative_prompt: What it leads away from.
    """

    guidance: float = 4.0
    negative_prompt: str = ""

    def __call__(
        self,
        pipe,
        rng=None,
        roles: Roles | None = None,
        negative: Mapping[str, Any] | None = None,
        progress: TrainProgress | None = None,
        *,
        input_latents: Tensor,
        height: int,
        width: int,
        **inputs,
    ) -> Tensor:
        """Loss per sample (B,) of clean `input_latents` (B, …) and the network's other inputs; see `LossContext`."""
        context = LossContext(
            pipe=pipe,
            rng=rng or GlobalRNG(len(input_latents)),
            roles=roles,
            progress=progress,
            clean=input_latents.float(),
            size={"height": height, "width": width},
            inputs=inputs,
            negative=negative,
        )
        return self.loss(context)

    def loss(self, context: LossContext) -> Tensor:
        """Loss per sample (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def trains_student(self, progress: TrainProgress | None) -> bool:
        """Whether it is the student that is trained, or measured, at a moment."""
        return progress is None or MODEL in self.trained_at(progress.step)

    def build_roles(self, pipe, lora, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed)
