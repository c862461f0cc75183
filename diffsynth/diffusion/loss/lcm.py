"""Latent consistency: from every point of the teacher's path, the student jumps to its end.

Luo et al. 2023, "Latent Consistency Models" (https://arxiv.org/abs/2310.04378).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..base_pipeline import BasePipeline
from ..trained import TrainProgress
from .consistency import Consistency


@dataclass(frozen=True, kw_only=True)
class LatentConsistency(Consistency):
    """mean ‖f_θ(x_t, t) - sg f_θ(x̂_t', t')‖² / t² with f_θ(x_t, t) = x_t - t v_θ(x_t, t), which is x₀ at t = 0.

    This is `Consistency` with one segment, down to 0, and a fixed guidance scale (§4.2). The teacher steps between the
    levels of a coarse grid of `grid_steps` levels: the paper (§4.3) skips 20 of 1000 levels per step, which leaves 50.
    """

    def edges(self, pipe: BasePipeline, size: Mapping, progress: TrainProgress | None) -> list[float]:
        return [0.0]
