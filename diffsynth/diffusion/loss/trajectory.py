"""Trajectory imitation: each of the student's few steps must go where the teacher's many steps went.

DiffSynth-Studio 2025, "Trajectory Imitation" (https://github.com/modelscope/DiffSynth-Studio); regressing on the
solution of the teacher's ODE goes back to Luhman & Luhman 2021 (https://arxiv.org/abs/2101.02388).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base_pipeline import BasePipeline
from ..flow_match import TRAINING_STEPS
from ..randomness import GlobalRNG, SampleRNG
from .distillation import Distillation


@dataclass(frozen=True, kw_only=True)
class TrajectoryImitation(Distillation):
    """Σ_k mean ‖v_θ(x_k, σ_k) - (x_{k+1} - x_k) / (σ_{k+1} - σ_k)‖², x_k the teacher's latents at noise level σ_k.

    σ_1 … σ_K are the student's noise levels, and σ_{K+1} = 0. Each step starts from the teacher's latents, so that no
    gradient goes from step to step, and errors that add up on the student's own path are not seen.

    Args:
        extra_inputs: The column `seed`.
        displacement: Weight each step by (σ_{k+1} - σ_k)², which makes the error one of latents instead of velocities.
    """

    extra_inputs: Sequence[str] = ("seed",)
    displacement: bool = False

    keeps_trajectory: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.student.renoise:
            raise ValueError(
                "task.student.renoise=true adds fresh noise at each step, but trajectory imitation follows the "
                "teacher's path; set task.student.renoise=false."
            )
        if self.teacher is None:
            raise ValueError(
                "task.teacher is null, but distill/trajectory learns from the teacher's latents between noise and "
                "image, which a data set of images does not hold; keep task.teacher and sample with it by "
                "make_cache.py."
            )

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them the teacher's `trajectory` (B, K + 1, …).
        """
        return self.loss(pipe, **inputs)

    def loss(self, pipe: BasePipeline, trajectory: Tensor, height: int, width: int, **inputs) -> Tensor:
        with pipe.sampling_steps({"height": height, "width": width, **self.student.settings}) as scheduler:
            sigmas = torch.tensor(scheduler.levels, device=trajectory.device)
        points, losses = trajectory.float(), []
        for index, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            start, end = points[:, index], points[:, index + 1]
            velocity = pipe.predict((sigma * TRAINING_STEPS).expand(len(points)), **{**inputs, "latents": start})
            error = velocity.float() - (end - start) / (next_sigma - sigma)
            weight = (next_sigma - sigma) ** 2 if self.displacement else 1
            losses.append(weight * error.pow(2).flatten(1).mean(1))
        return torch.stack(losses).sum(0)
