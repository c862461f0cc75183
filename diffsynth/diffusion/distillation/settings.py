"""Sampling settings of a distillation's student and teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...core.ranges import NonNegativeFloat, PositiveFraction, SamplingSteps, check_fields


@dataclass(frozen=True, kw_only=True)
class Student:
    """How the student samples: in few steps, without guidance.

    Args:
        num_inference_steps: Number of steps.
        sigmas: Noise levels, decreasing from 1; None takes the family's.
        renoise: Add fresh noise at each step, as consistency models do, instead of following the ODE.
    """

    num_inference_steps: SamplingSteps = 4
    sigmas: Sequence[PositiveFraction] | None = None
    renoise: bool = False

    def __post_init__(self):
        check_fields(self, "task.student.")
        if self.sigmas is None:
            return
        decreasing = all(a > b for a, b in pairwise([*self.sigmas, 0]))
        if len(self.sigmas) != self.num_inference_steps or self.sigmas[0] != 1 or not decreasing:
            raise ValueError(
                f"task.student.sigmas is {list(self.sigmas)}; expected {self.num_inference_steps} noise levels (as "
                "many as task.student.num_inference_steps) that decrease from 1 and stay above 0."
            )

    @property
    def settings(self) -> dict:
        """The student's sampling settings, arguments of the pipeline's call; exports store them with the weights."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "cfg_scale": 1,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "sampler": "renoise" if self.renoise else "euler",
        }


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """How the teacher samples the images that a student learns from.

    Args:
        num_inference_steps: Number of steps.
        cfg_scale: Scale of classifier-free guidance; 1 switches it off.
        negative_prompt: Prompt of the unconditional prediction.
    """

    num_inference_steps: SamplingSteps = 40
    cfg_scale: NonNegativeFloat = 4.0
    negative_prompt: str = ""

    def __post_init__(self):
        check_fields(self, "task.teacher.")

    @property
    def settings(self) -> dict:
        """The teacher's sampling settings, arguments of the pipeline's call."""
        names = ("num_inference_steps", "cfg_scale", "negative_prompt")
        return {**{name: getattr(self, name) for name in names}, "sampler": "euler"}
