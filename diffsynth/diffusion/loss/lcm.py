"""Latent consistency: from every point of the teacher's path, one jump leads to its end.

Luo et al. 2023, "Latent Consistency Models" (https://arxiv.org/abs/2310.04378).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .consistency import Consistency


@dataclass(frozen=True, kw_only=True)
class LatentConsistency(Consistency):
    """d(f_θ(x_t, t), sg f_θ(x̂_t', t')) with f_θ(x_t, t) = x_t - t v_θ(x_t, t), which at t = 0 is x_0 by itself.

    `Consistency` in one segment down to 0, under guidance of a fixed scale (§4.2). Steps of the teacher as long as
    those of a coarse grid are what skipping k of N levels (§4.3) makes: 20 of 1000 there, 50 left.

    d(e) = √(mean e² + c²) - c, pseudo-Huber: Song & Dhariwal 2023, §3.3 (https://arxiv.org/abs/2310.14189), by the
    root of the number of values in e, so that c does not depend on it.

    Args:
        huber_c: c; there 0.00054.
    """

    huber_c: float = 0.00054

    def edges(self, pipe, size: Mapping, moment) -> Tensor:
        return torch.zeros(1)

    def distance(self, error: Tensor) -> Tensor:
        return (super().distance(error) + self.huber_c**2).sqrt() - self.huber_c
