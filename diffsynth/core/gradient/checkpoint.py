"""Gradient checkpointing: keep a block's inputs, run it again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_recomputed_in: ContextVar[Callable[[], AbstractContextManager] | None] = ContextVar("recomputed_in", default=None)


@contextmanager
def recomputing_in(context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """What is checkpointed inside is run again in `context()`: with the adapter, say, that it was run with at first."""
    token = _recomputed_in.set(context)
    try:
        yield
    finally:
        _recomputed_in.reset(token)


def _checkpoint(model, *args, **kwargs):
    again = _recomputed_in.get()
    contexts = {} if again is None else {"context_fn": lambda: (nullcontext(), again())}
    return checkpoint(model, *args, use_reentrant=False, **contexts, **kwargs)


def gradient_checkpoint_forward(
    model, use_gradient_checkpointing: bool, use_gradient_checkpointing_offload: bool, *args, **kwargs
):
    """Call `model(*args, **kwargs)`, saving only its inputs; with offload, saving them in host memory.

    Args:
        model: Any callable, usually one block of a transformer.
        use_gradient_checkpointing: Recompute the block in the backward pass.
        use_gradient_checkpointing_offload: The same, and the saved inputs wait in (pinned) host memory.
    """
    if use_gradient_checkpointing_offload:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return _checkpoint(model, *args, **kwargs)
    if use_gradient_checkpointing:
        return _checkpoint(model, *args, **kwargs)
    return model(*args, **kwargs)


def checkpoint_blocks(module: nn.Module, enabled: bool, offload: bool) -> None:
    """Make a diffusers or transformers model run its own blocks through `gradient_checkpoint_forward`.

    Raises:
        ValueError: The model has no blocks that it could checkpoint.
    """
    wanted = enabled or offload
    if not hasattr(module, "gradient_checkpointing"):
        if wanted:
            raise ValueError(
                f"{type(module).__name__} has no gradient checkpointing of its own; set memory.checkpointing=none."
            )
        return
    module.gradient_checkpointing = wanted
    module._gradient_checkpointing_func = _checkpointing_func(enabled, offload)


def _checkpointing_func(enabled: bool, offload: bool):
    def run(block, *args):
        return gradient_checkpoint_forward(block, enabled, offload, *args)

    return run
