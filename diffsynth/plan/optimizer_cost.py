"""Measures the memory of an optimizer by stepping it on a small tensor, as each optimizer has its own state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.live_bytes import LiveBytes, bytes_of
from ..training.fused import fused
from ..training.stochastic_rounding import AT_ONCE, StochasticRounding

NUMEL = 1 << 16  # of the measured tensor; a guess: large enough that state per tensor does not count


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes per trained parameter.

    Args:
        state: Optimizer state, which is kept from step to step.
        transient: What a step takes in addition.
        at_once: Numbers that are stepped at once, if tensors are stepped together: `transient` counts for these.
    """

    state: float
    transient: float
    at_once: float

    def update(self, total: int, largest: int) -> int:
        """Return the bytes that a step takes in addition, for `total` numbers, the largest tensor having `largest`."""
        return round(self.transient * min(total, max(largest, self.at_once)))


def optimizer_cost(optimizer: Callable, dtype: torch.dtype, on_cuda: bool) -> OptimizerCost:
    """Measure the cost of `optimizer(parameters)` for weights of a dtype.

    Args:
        on_cuda: Whether the run is on CUDA, where torch's optimizers step all tensors at once.
    """
    weight = nn.Parameter(torch.zeros(NUMEL, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    rounding = StochasticRounding([weight]) if dtype == torch.bfloat16 else None
    built = (fused(optimizer) if on_cuda else optimizer)(rounding.fp32_copies if rounding else [weight])
    together = on_cuda and steps_all_at_once(built)
    for group in built.param_groups:
        if together:
            group["foreach"] = True
    getattr(built, "train", lambda: None)()  # schedule-free optimizers step in training mode only
    step = partial(rounding.step, built, seed=0) if rounding else built.step
    step()
    state = [leaf for leaf in tree_leaves(list(built.state.values())) if isinstance(leaf, torch.Tensor)]
    weight.grad = torch.zeros_like(weight)
    with LiveBytes() as live:
        live.watch([weight, weight.grad, *state])
        before = live.device.now
        step()
    at_once = AT_ONCE if rounding else math.inf if together else 0
    return OptimizerCost(bytes_of(state) / NUMEL, (live.device.peak - before) / NUMEL, at_once)


def steps_all_at_once(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer steps all tensors at once on CUDA, as torch's own do by default."""
    options = optimizer.defaults
    return "foreach" in options and options["foreach"] is None and not options.get("fused")
