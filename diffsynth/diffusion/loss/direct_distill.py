"""Direct distillation: the few-step student must end where the teacher's many steps ended from the same noise.

DiffSynth-Studio 2025, "Direct Distill" (https://github.com/modelscope/DiffSynth-Studio).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.gradient import gradient_checkpoint_forward
from ..base_pipeline import BasePipeline
from ..distillation.settings import Student
from ..flow_match import FlowMatchScheduler
from ..randomness import GlobalRNG, SampleRNG
from .distillation import Distillation


@dataclass(frozen=True, kw_only=True)
class DirectDistill(Distillation):
    """mean ‖x_N - x₀‖², x_N the end of N Euler steps x_{k+1} = x_k + (σ_{k+1} - σ_k) v_θ(x_k, σ_k) from the noise x_0.

    x₀ is the teacher's sample from that noise. The gradient goes through all N steps, which are at the student's own
    noise levels. The backward pass recomputes each step, so that memory does not grow with N.

    Args:
        extra_inputs: Columns of the settings that each image was sampled with: `seed`; `rand_device` is read as well if
            rows have it.
    """

    extra_inputs: Sequence[str] = ("seed",)

    samples_in_training: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.student.renoise:
            raise ValueError(
                "task.student.renoise=true adds fresh noise at each step, but direct distillation maps the teacher's "
                "first noise to its sample; set task.student.renoise=false."
            )

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them the teacher's samples `input_latents` (B, …) and their noise `latents` (B, …).
        """
        return self.loss(pipe, **inputs)

    def loss(
        self,
        pipe: BasePipeline,
        latents: Tensor,
        input_latents: Tensor,
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        **inputs,
    ) -> Tensor:
        size = {"height": height, "width": width}
        _check_equal({**size, "num_inference_steps": num_inference_steps})
        student = self.student
        if num_inference_steps not in (None, student.num_inference_steps):
            student = Student(num_inference_steps=num_inference_steps)
        with pipe.sampling_steps({**size, **student.settings}) as scheduler:
            timesteps = scheduler.timesteps.to(latents.device)
            for index, timestep in enumerate(timesteps):
                given = {**inputs, **pipe.inputs_at(scheduler.levels[index], inputs)}
                step = _Step(pipe, scheduler, index, timestep.expand(len(latents)), given)
                latents = gradient_checkpoint_forward(step, len(timesteps) > 1, False, latents)
        return (latents.float() - input_latents.float()).pow(2).flatten(1).mean(1)


@dataclass(frozen=True)
class _Step:
    """One Euler step of latents (B, …), as a function that gradient checkpointing can call again."""

    pipe: BasePipeline
    scheduler: FlowMatchScheduler
    index: int
    timestep: Tensor
    inputs: dict

    def __call__(self, latents: Tensor) -> Tensor:
        velocity = self.pipe.predict(self.timestep, **{**self.inputs, "latents": latents})
        return self.scheduler.step(velocity, self.index, latents)


def _check_equal(request: dict) -> None:
    for name, values in request.items():
        if isinstance(values, list):  # `collate` makes a list where the samples differ
            found = ", ".join(map(str, sorted(set(values))))
            raise ValueError(
                f"Samples of a batch have {name} {found}; expected one value, because they are sampled together: set "
                "micro_batch_size=1."
            )


DirectDistillLoss = DirectDistill()  # called like a function
