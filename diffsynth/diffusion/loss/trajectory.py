"""Trajectory imitation: each of a few steps goes where the teacher's many went from the same point.

DiffSynth-Studio 2025, "Trajectory Imitation" (https://github.com/modelscope/DiffSynth-Studio); regressing on the
solution of the teacher's ODE goes back to Luhman & Luhman 2021 (https://arxiv.org/abs/2101.02388).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..flow_match import TRAINING_STEPS
from .distillation import Distillation


@dataclass(frozen=True, kw_only=True)
class TrajectoryImitation(Distillation):
    """Σ_k mean ‖v_θ(x_k, σ_k) - (x_{k+1} - x_k) / (σ_{k+1} - σ_k)‖², x_k where the teacher's path passes σ_k.

    σ_1 … σ_K are the student's noise levels, σ_{K+1} = 0; no gradient goes from step to step, so one pass of the
    network over each of them does; what errors add up to on the student's own path is not seen.

    Args:
        extra_inputs: The column `seed`.
        displacement: Weigh each step by (σ_{k+1} - σ_k)², so that errors count as far as they move the latents.
    """

    extra_inputs: Sequence[str] = ("seed",)
    displacement: bool = False

    keeps_trajectory: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.student.renoise:
            raise ValueError("task.student.renoise=true leaves the teacher's path that the student is to imitate.")
        if self.teacher is None:
            raise ValueError(
                "distill/trajectory learns from what the teacher passed on its way, which pictures do not show; "
                "leave task.teacher as it is and make its data with make_cache.py."
            )

    def __call__(self, pipe, rng=None, **inputs) -> Tensor:
        """Loss per sample (B,) of a teacher's `trajectory` (B, K + 1, …) and the network's other inputs."""
        return self.loss(pipe, **inputs)

    def loss(self, pipe, trajectory: Tensor, height: int, width: int, **inputs) -> Tensor:
        with pipe.sampling_steps({"height": height, "width": width, **self.student.settings}) as scheduler:
            sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)]).to(trajectory.device)
        points, losses = trajectory.float(), []
        for index, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            start, end = points[:, index], points[:, index + 1]
            velocity = pipe.predict((sigma * TRAINING_STEPS).expand(len(points)), **{**inputs, "latents": start})
            error = velocity.float() - (end - start) / (following - sigma)
            weight = (following - sigma) ** 2 if self.displacement else 1
            losses.append(weight * error.pow(2).flatten(1).mean(1))
        return torch.stack(losses).sum(0)
