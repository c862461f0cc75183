"""Gradient checkpointing: save only the inputs of a part of a network, and run it again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .offload import offloaded

Context = Callable[[nn.Module], AbstractContextManager]

_recomputed_in: ContextVar[tuple[Context, ...]] = ContextVar("recomputed_in", default=())
_checkpointed: ContextVar[bool] = ContextVar("checkpointed", default=False)


@contextmanager
def recomputing_in(context: Context) -> Iterator[None]:
    """Make the backward pass run modules that are checkpointed inside again in `context(module)`.

    The second run then sees the same state as the first, such as the active adapter.
    """
    token = _recomputed_in.set((*_recomputed_in.get(), context))
    try:
        yield
    finally:
        _recomputed_in.reset(token)


def is_checkpointed() -> bool:
    """Whether the running code belongs to a checkpointed module, in its first run or in its second."""
    return _checkpointed.get()


class _Recomputed:
    """A callable to checkpoint: its first call is plain, later ones enter the contexts of `recomputing_in`.

    Args:
        count: Number of positional arguments; values after them are keyword arguments called `names`.
    """

    def __init__(self, model: Callable, count: int, names: tuple[str, ...]):
        self.model, self.count, self.names = model, count, names
        self.contexts, self.has_run = _recomputed_in.get(), False

    def __call__(self, *values: Any) -> Any:
        contexts, self.has_run = self.contexts if self.has_run else (), True
        kwargs = dict(zip(self.names, values[self.count :], strict=True))
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(_module_of(self.model)))
            stack.callback(_checkpointed.reset, _checkpointed.set(True))
            return self.model(*values[: self.count], **kwargs)


def _module_of(model: Callable) -> Any:
    """The module whose forward method `model` is, or else `model` itself."""
    return getattr(model, "__self__", model)


def _checkpoint(model: Callable, *args: Any, **kwargs: Any) -> Any:
    # All inputs are passed by position, because only those are saved where saved_tensors_hooks see them.
    names, values = tuple(kwargs), (*args, *kwargs.values())
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not deepspeed.checkpointing.is_configured():
        is_random = getattr(_module_of(model), "may_be_random", True)
        run = _Recomputed(model, len(args), names)
        return checkpoint(run, *values, use_reentrant=False, preserve_rng_state=is_random)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        return model(*args, **kwargs)  # DeepSpeed's checkpoint is re-entrant: it needs an input with gradient
    with recomputing_in(_autocast_on(tensors[0].device.type)):  # torch's checkpoint restores autocast by itself
        run = _Recomputed(model, len(args), names)
    return deepspeed.checkpointing.checkpoint(run, *values)


def _autocast_on(device: str) -> Context:
    """A context that restores the current autocast state of a device type."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return lambda module: torch.autocast(device, dtype, enabled)


def gradient_checkpoint_forward(
    model: Callable,
    use_gradient_checkpointing: bool,
    use_gradient_checkpointing_offload: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call `model(*args, **kwargs)` under gradient checkpointing, optionally with its inputs offloaded to host memory.

    If DeepSpeed's activation checkpointing is configured, as ZeRO-3 needs it, DeepSpeed does the checkpointing.
    The states of the random number generators are saved for the second run, unless `policies.follow` marked a module
    as not random.

    Args:
        model: Any callable, usually one block of a transformer.
        use_gradient_checkpointing: Save only the inputs and compute the rest again in the backward pass.
        use_gradient_checkpointing_offload: The same, with the saved inputs in (pinned) host memory.
    """
    if use_gradient_checkpointing_offload:
        with offloaded(model):
            return _checkpoint(model, *args, **kwargs)
    if use_gradient_checkpointing:
        return _checkpoint(model, *args, **kwargs)
    return model(*args, **kwargs)


def checkpoint_blocks(module: nn.Module, enabled: bool, offload: bool) -> None:
    """Make a diffusers or transformers model run its blocks through `gradient_checkpoint_forward`, or no longer.

    Blocks that `policies.follow` marked with `keeps_activations` are not checkpointed; with `offload`, their
    activations go to host memory.

    Raises:
        ValueError: The model does not support gradient checkpointing.
    """
    is_wanted = enabled or offload
    if not hasattr(module, "gradient_checkpointing"):
        if is_wanted:
            raise ValueError(
                f"{type(module).__name__} has no gradient checkpointing of its own (no attribute "
                "gradient_checkpointing); set memory.checkpointing=none."
            )
        return
    module.gradient_checkpointing = is_wanted
    module._gradient_checkpointing_func = _checkpointing_func(enabled, offload)


def _checkpointing_func(enabled: bool, offload: bool) -> Callable:
    def run(block: nn.Module, *args: Any) -> Any:
        if not getattr(block, "keeps_activations", False):
            return gradient_checkpoint_forward(block, enabled, offload, *args)
        with offloaded(block) if offload else nullcontext():
            return block(*args)

    return run
