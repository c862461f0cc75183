"""Gradient checkpointing: keep the inputs of a part of a network, run it again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .offload import offloaded

Context = Callable[[nn.Module], AbstractContextManager]

_recomputed_in: ContextVar[tuple[Context, ...]] = ContextVar("recomputed_in", default=())
_checkpointed: ContextVar[bool] = ContextVar("checkpointed", default=False)


@contextmanager
def recomputing_in(context: Context) -> Iterator[None]:
    """What is checkpointed inside is run again in `context(module)`: with the adapter, say, that it was run with."""
    token = _recomputed_in.set((*_recomputed_in.get(), context))
    try:
        yield
    finally:
        _recomputed_in.reset(token)


def is_checkpointed() -> bool:
    """Whether what runs now will be run again, or is run again, for the backward pass."""
    return _checkpointed.get()


class _Recomputed:
    """A module's call with given inputs: run as it is at first, in its contexts from then on."""

    def __init__(self, model: Callable, count: int, names: tuple[str, ...]):
        self.model, self.count, self.names = model, count, names
        self.contexts, self.has_run = _recomputed_in.get(), False

    def __call__(self, *values):
        contexts, self.has_run = self.contexts if self.has_run else (), True
        given = dict(zip(self.names, values[self.count :], strict=True))
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(getattr(self.model, "__self__", self.model)))
            stack.callback(_checkpointed.reset, _checkpointed.set(True))
            return self.model(*values[: self.count], **given)


def _checkpoint(model: Callable, *args, **kwargs):
    # By position, named inputs are saved as the others are: where hooks see them.
    names, values = tuple(kwargs), (*args, *kwargs.values())
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not deepspeed.checkpointing.is_configured():
        return checkpoint(_Recomputed(model, len(args), names), *values, use_reentrant=False)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        return model(*args, **kwargs)  # a re-entrant checkpoint gives gradients only to what its inputs lead to
    with recomputing_in(_autocast_on(tensors[0].device.type)):  # which torch's checkpoint does by itself
        run = _Recomputed(model, len(args), names)
    return deepspeed.checkpointing.checkpoint(run, *values)


def _autocast_on(device: str) -> Context:
    """The precision that is computed in now."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return lambda module: torch.autocast(device, dtype, enabled)


def gradient_checkpoint_forward(
    model, use_gradient_checkpointing: bool, use_gradient_checkpointing_offload: bool, *args, **kwargs
):
    """Call `model(*args, **kwargs)`, saving only its inputs; with offload, saving them in host memory.

    Where DeepSpeed's activation checkpointing is configured it does the saving, as ZeRO-3 needs it.

    Args:
        model: Any callable, usually one block of a transformer.
        use_gradient_checkpointing: Recompute the block in the backward pass.
        use_gradient_checkpointing_offload: The same, and the saved inputs wait in (pinned) host memory.
    """
    if use_gradient_checkpointing_offload:
        with offloaded(model):
            return _checkpoint(model, *args, **kwargs)
    if use_gradient_checkpointing:
        return _checkpoint(model, *args, **kwargs)
    return model(*args, **kwargs)


def checkpoint_blocks(module: nn.Module, enabled: bool, offload: bool) -> None:
    """Make a diffusers or transformers model run its own blocks through `gradient_checkpoint_forward`.

    Blocks that a policy says to keep (`policies.follow`) keep their activations; with offload, in host memory.

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
        if not getattr(block, "keeps_activations", False):
            return gradient_checkpoint_forward(block, enabled, offload, *args)
        with offloaded(block) if offload else nullcontext():
            return block(*args)

    return run
