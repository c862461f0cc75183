"""`Distillation` and `RoleDistillation`: the base classes of the objectives that train a student of few steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from ...core.ranges import NonNegativeFloat
from ..adapters.lora import Adapter
from ..base_pipeline import BasePipeline
from ..distillation.context import LossContext
from ..distillation.roles import Roles
from ..distillation.settings import Student, Teacher
from ..distillation.teacher_sampler import TeacherSampler
from ..pipeline.units import PipelineUnit
from ..randomness import GlobalRNG, SampleRNG
from ..trained import MODEL, TrainProgress
from .base import Objective, sampled_with


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """A student that learns to sample in few steps.

    Args:
        student: The student's sampling settings, in training and afterwards; exports store them with the weights.
        teacher: The settings with which `make_cache.py` samples the images to learn from; None if the data set holds
            the images to learn from.
    """

    student: Student = field(default_factory=Student)
    teacher: Teacher | None = None

    is_distillation: ClassVar[bool] = True
    optional_columns: ClassVar[Sequence[str]] = ("rand_device",)
    keeps_trajectory: ClassVar[bool] = False  # whether the loss reads the teacher's latents between noise and image

    def __post_init__(self):
        steps, most = self.student.num_inference_steps, self.teacher and self.teacher.num_inference_steps
        if most and steps > most:
            raise ValueError(
                f"task.student.num_inference_steps is {steps}, more than the teacher's {most} "
                f"(task.teacher.num_inference_steps); set it to at most {most}."
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
    def sampling_settings(self) -> Mapping[str, Any]:
        return self.student.settings

    def rehearsed(self) -> Objective:
        """The teacher takes as few steps as the student: its memory does not depend on their number."""
        if self.teacher is None:
            return self
        return replace(self, teacher=replace(self.teacher, num_inference_steps=self.student.num_inference_steps))

    @property
    def row_inputs(self) -> dict[str, str]:
        seed = {} if self.teacher is None else {"seed": "seed"}
        return {**super().row_inputs, **seed}

    def all_units(self, pipe: BasePipeline) -> list[PipelineUnit]:
        """The pipeline's units; sampling with the teacher replaces the unit that encodes the data set's images."""
        if self.teacher is None:
            return pipe.units
        sampler = TeacherSampler(pipe, self.teacher, self.student if self.keeps_trajectory else None)
        others = [unit for unit in pipe.units if not set(unit.output_params) & set(sampler.output_params)]
        return [*others, sampler]

    def wanted_inputs(self, pipe: BasePipeline) -> set[str]:
        """The inputs that this objective reads, and those of all distillations, so that one cache serves them all."""
        return super().wanted_inputs(pipe) | {"latents", "input_latents", "height", "width"}

    def sampling_inputs(self, pipe: BasePipeline) -> dict[str, Any]:
        return sampled_with(pipe)

    def check_row(self, row: Mapping) -> None:
        if float(row.get("cfg_scale", 1)) != 1:
            raise ValueError(
                f"cfg_scale is {row['cfg_scale']}; expected 1, because the student samples without guidance (it learns "
                "guidance from the teacher's images): write 1 into that column."
            )
        found, own = row.get("num_inference_steps"), self.student.num_inference_steps
        if found is not None and int(found) != own:
            raise ValueError(
                f"num_inference_steps is {found} in this row, but task.student.num_inference_steps is {own}; set "
                f"task.student.num_inference_steps={found}, which is stored with the student's weights."
            )

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        network = pipe.in_iteration_models[0]
        trained = {*(lora.models if lora else ()), *(name.split(".")[0] for name in self.trainable_models or ())}
        if trained - {network}:
            raise ValueError(
                f"task.trainable_models and lora.models name {sorted(trained)}; a distillation trains {network} alone, "
                "because teacher and student share all other models."
            )
        if self.teacher and not cached:
            raise ValueError(
                "The teacher's images are not there: make them with `make_cache.py` and the same model, task and "
                "dataset, then train with dataset=cache; or choose teacher=none if the images in the data set are the "
                "teacher's."
            )
        if self.teacher and lora and lora.preset:
            raise ValueError(
                f"lora.preset={lora.preset} would be merged into the student, but the teacher's images were sampled "
                "without it; merge it into the base first (fuse.py), and make the teacher's images with the merged "
                "base."
            )


@dataclass(frozen=True, kw_only=True)
class RoleDistillation(Distillation):
    """A distillation in which the teacher, and perhaps further roles, predict during training.

    Args:
        guidance: Scale of the teacher's classifier-free guidance in training; 1 switches it off.
        negative_prompt: Prompt of the teacher's unconditional prediction.
    """

    guidance: NonNegativeFloat = 4.0
    negative_prompt: str = ""

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs: Any) -> Tensor:
        """Loss per sample (B,) from clean `input_latents` (B, …); see `LossContext.of` for the other inputs."""
        return self.loss(LossContext.of(pipe, rng, **inputs))

    def loss(self, context: LossContext) -> Tensor:
        """Loss per sample (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def trains_student(self, progress: TrainProgress | None) -> bool:
        """Whether the loss is the student's at this progress: its turn in training, or None, which evaluates it."""
        return progress is None or MODEL in self.trained_at(progress.step)

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed)
