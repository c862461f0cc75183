"""Exponential moving average (EMA) of the trained weights; it usually samples better images than the last weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.host_memory import empty, fill, flat_size, flat_views, lane
from ..core.ranges import FractionBelowOne, PositiveFraction, PositiveInt, check_arguments


class EMA:
    """Exponential moving average of the trained parameters, ā ← β ā + (1 - β) θ.

    With constant decay, β = `decay`. With `power`, β = min(`decay`, 1 - (1 + t)^-`power`) at optimizer step t, so that
    the initial weights lose their influence in a run of any length. Karras et al. 2024
    (https://arxiv.org/abs/2312.02696, §3.1) use a decay of the same shape.

    With `every` N > 1 the average moves once in N steps, with the product of their β, so that the initial weights lose
    their influence as fast as with N = 1. Between updates the average lags by up to N - 1 steps.

    Args:
        decay: β, or its upper limit, in [0, 1).
        power: Exponent of the power form, in (0, 1]; None keeps β constant.
        device: Device of the average; None is the parameters' own, `cpu` saves GPU memory.
        every: Optimizer steps between updates of the average, at least 1.

    Attributes:
        betas: β of the steps since the last update of the average; a checkpoint holds them.
    """

    weights = ("raw", "ema")  # the sets of weights that can be evaluated and exported

    def __init__(
        self,
        decay: FractionBelowOne = 0.999,
        power: PositiveFraction | None = None,
        device: str | None = None,
        every: PositiveInt = 1,
    ):
        check_arguments(EMA.__init__, "ema.", decay=decay, power=power, every=every)
        self.decay, self.power, self.device, self.every = decay, power, device, every
        self.average: list[Tensor] = []
        self.betas: list[float] = []

    @property
    def on_device(self) -> bool:
        """Whether the average is where the parameters are."""
        return self.device is None

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Start the average at the parameters' current values (tensors of any shape)."""
        parameters = [p.detach() for p in parameters]
        self.average = [p.to(self.device or p.device, torch.float32, copy=True) for p in parameters]
        if not self.on_device:
            self.buffer = empty(flat_size(parameters), parameters[0].device)  # unpinned when nothing refers to it
            self.staging = flat_views(self.buffer, parameters)

    def beta(self, step: int) -> float:
        """Return β of optimizer step `step`, counted from 1."""
        return self.decay if self.power is None else min(self.decay, 1 - (1 + step) ** -self.power)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Count optimizer step `step`; after `every` of them move the average towards the parameters."""
        self.betas.append(self.beta(step))
        if len(self.betas) < self.every:
            return
        weight = 1 - math.prod(self.betas)
        self.betas.clear()
        if self.on_device:
            torch._foreach_lerp_(self.average, [p.detach().float() for p in parameters], weight)
            return
        for average, value in zip(self.average, self._staged(parameters), strict=True):
            average.lerp_(value.to(average.device, torch.float32), weight)

    @contextmanager
    def in_place(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block, the parameters have the average's values, for evaluation or export."""
        raw = [p.detach().clone() for p in parameters] if self.on_device else self._staged(parameters)
        _copy_into(parameters, self.average)
        try:
            yield
        finally:
            _copy_into(parameters, raw)

    @torch.no_grad()
    def _staged(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the parameters in host memory, valid until the next call, waited for once, all together."""
        copies = lane(parameters[0].device)
        with copies.after_computation():
            for copy, parameter in zip(self.staging, parameters, strict=True):
                copy.copy_(parameter, non_blocking=parameter.is_cuda)
        copies.finish()
        return self.staging


@torch.no_grad()
def _copy_into(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        fill(parameter, value)
