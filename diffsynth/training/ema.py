"""Exponential moving average (EMA) of the trained weights; it usually samples better images than the last weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Exponential moving average of the trained parameters, ā ← β ā + (1 - β) θ.

    With constant decay, β = `decay`. With `power`, β = min(`decay`, 1 - (1 + t)^-`power`) at optimizer step t, so that
    the initial weights lose their influence in a run of any length. Karras et al. 2024
    (https://arxiv.org/abs/2312.02696, §3.1) use a decay of the same shape.

    Args:
        decay: β, or its upper limit, in [0, 1).
        power: Exponent of the power form, in (0, 1]; None keeps β constant.
        device: Device of the average; None is the parameters' own, `cpu` saves GPU memory.
    """

    weights = ("raw", "ema")  # the sets of weights that can be evaluated and exported

    def __init__(self, decay: float = 0.999, power: float | None = None, device: str | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}; expected a number in [0, 1).")
        if power is not None and not 0 < power <= 1:
            raise ValueError(f"ema.power is {power}; expected a number in (0, 1], or null for a constant decay.")
        self.decay, self.power, self.device = decay, power, device
        self.average: list[Tensor] = []

    @property
    def on_device(self) -> bool:
        """Whether the average is where the parameters are."""
        return self.device is None

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Start the average at the parameters' current values (tensors of any shape)."""
        self.average = [p.detach().to(self.device or p.device, torch.float32, copy=True) for p in parameters]

    def beta(self, step: int) -> float:
        """Return β of optimizer step `step`, counted from 1."""
        return self.decay if self.power is None else min(self.decay, 1 - (1 + step) ** -self.power)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Move the average towards the parameters after optimizer step `step`."""
        now = [p.detach().to(a.device, torch.float32) for p, a in zip(parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, now, 1 - self.beta(step))

    @contextmanager
    def in_place(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block, the parameters have the average's values, for evaluation or export."""
        raw = [p.detach().clone() for p in parameters]
        _copy_into(parameters, self.average)
        try:
            yield
        finally:
            _copy_into(parameters, raw)


@torch.no_grad()
def _copy_into(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
