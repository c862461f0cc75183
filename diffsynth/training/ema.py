"""An average of the weights over the steps, which draws better than where the last step happened to land."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Exponential moving average of the trained parameters, ā ← β ā + (1 - β) θ.

    Constant: β = `decay`. Power: β = min(`decay`, 1 - (1 + t)^-`power`), which forgets the start at any length of run
    (Karras et al. 2024, https://arxiv.org/abs/2312.02696, §3.1, have the same shape).

    Args:
        decay: β, or its upper limit, in [0, 1).
        power: Exponent of the power form; None for the constant one.
        device: Where the average is kept; None beside the parameters, `cpu` to spare a GPU's memory.
    """

    weights = ("raw", "ema")  # what there is to evaluate and export

    def __init__(self, decay: float = 0.999, power: float | None = None, device: str | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}; expected a number in [0, 1).")
        self.decay, self.power, self.device = decay, power, device
        self.average: list[Tensor] = []

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Begin with the parameters as they are."""
        self.average = [p.detach().to(self.device or p.device, torch.float32, copy=True) for p in parameters]

    def beta(self, step: int) -> float:
        """β of optimizer step `step`, counted from 1."""
        return self.decay if self.power is None else min(self.decay, 1 - (1 + step) ** -self.power)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Move towards the parameters that step `step` left."""
        now = [p.detach().to(a.device, torch.float32) for p, a in zip(parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, now, 1 - self.beta(step))

    @contextmanager
    def in_place(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Put the average where the parameters are, to draw or save with it, and put them back."""
        kept = [p.detach().clone() for p in parameters]
        _fill(parameters, self.average)
        try:
            yield
        finally:
            _fill(parameters, kept)


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
