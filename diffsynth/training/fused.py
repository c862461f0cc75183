"""Lets torch's optimizers update all weights in one kernel of the GPU."""

from collections.abc import Callable
from functools import partial

import torch

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # those with such a kernel that this project offers


def fused(optimizer: Callable) -> Callable:
    """Return the same optimizer with `fused=True`, if it has such a kernel and its options choose none.

    torch's default, `foreach`, makes copies of all weights in fp32 and moves more than twice the bytes.

    Args:
        optimizer: Called as `optimizer(parameters)`.
    """
    made, options = getattr(optimizer, "func", optimizer), getattr(optimizer, "keywords", {})
    if made not in FUSED or not {"fused", "foreach"}.isdisjoint(options):
        return optimizer
    return partial(optimizer, fused=True)
