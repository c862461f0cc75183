"""What an optimizer keeps, and what a step of it takes: measured on a small tensor, since each has its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.memory.live import LiveBytes, bytes_of
from ..training.stochastic_rounding import StochasticRounding

NUMBERS = 1 << 16  # of the tensor that is measured


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes a trained number.

    Args:
        state: Kept from step to step.
        transient: While it is stepped.
        together: All tensors are stepped at once, so that `transient` counts for all of them, not for the largest.
    """

    state: float
    transient: float
    together: bool

    def update(self, total: int, largest: int) -> int:
        """Bytes that stepping takes besides the state, of so many numbers of which the largest tensor has so many."""
        return round(self.transient * (total if self.together else largest))


def optimizer_cost(optimizer: Callable, dtype: torch.dtype, on_cuda: bool) -> OptimizerCost:
    """The cost of `optimizer(parameters)` for weights of this dtype."""
    weight = nn.Parameter(torch.zeros(NUMBERS, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    rounding = StochasticRounding([weight]) if dtype == torch.bfloat16 else None
    built = optimizer(rounding.fp32_copies if rounding else [weight])
    together = on_cuda and rounding is None and takes_all_together(built)
    for group in built.param_groups:
        if together:
            group["foreach"] = True
    getattr(built, "train", lambda: None)()  # schedule-free ones refuse to step otherwise
    step = partial(rounding.step, built, seed=0) if rounding else built.step
    step()
    kept = [leaf for leaf in tree_leaves(list(built.state.values())) if isinstance(leaf, torch.Tensor)]
    weight.grad = torch.zeros_like(weight)
    with LiveBytes() as live:
        live.watch([weight, weight.grad, *kept])
        before = live.device.now
        step()
    return OptimizerCost(bytes_of(kept) / NUMBERS, (live.device.peak - before) / NUMBERS, together)


def takes_all_together(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps all tensors at once on CUDA, as torch's own do unless told otherwise."""
    options = optimizer.defaults
    return "foreach" in options and options["foreach"] is None and not options.get("fused")
