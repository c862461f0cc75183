"""Checkpointing policies: which activations a network saves, which it recomputes, and where it keeps the saved ones.

A policy wraps the `forward` of a network's repeated blocks, or of their attention or feed-forward parts, from outside.
The network's own code does not change. The policies are:

- `none`: all activations are saved.
- `blocks`: only each block's inputs are saved.
- `attention`, `feed_forward`: only the inputs of these parts of each block are saved, and all activations of the rest.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .checkpoint import gradient_checkpoint_forward
from .offload import offloaded

LIBRARIES = ("diffusers", "transformers")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Names that these libraries give to the submodules of a block.
PARTS = {
    "attention": ("attn", "self_attn", "attention"),
    "feed_forward": ("ff", "ff_context", "img_mlp", "txt_mlp", "mlp", "feed_forward"),
}


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers or transformers network, in order; see `repeated_lists`."""
    return [block for blocks in repeated_lists(network).values() for block in blocks]


def repeated_lists(network: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of repeated blocks of a network, by name.

    A network names the classes of its repeated blocks in `_repeated_blocks` (diffusers) or `_no_split_modules` (both).
    """
    kinds = {
        kind
        for module in network.modules()
        for name in ("_repeated_blocks", "_no_split_modules")
        for kind in getattr(module, name, None) or ()
    }
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: blocks for name, blocks in lists.items() if blocks and _kinds(blocks) <= kinds}


def _kinds(blocks: nn.ModuleList) -> set[str]:
    return {type(block).__name__ for block in blocks}


def parts_of(block: nn.Module, policy: str) -> list[nn.Module]:
    """The submodules of a block that the policy `attention` or `feed_forward` recomputes."""
    return [part for name, part in block.named_children() if name in PARTS[policy]]


def honoured_policies(network: nn.Module) -> list[str]:
    """The policies that a network can follow; a part can be recomputed only if every block has it as a submodule."""
    blocks = repeated_blocks(network)
    if not blocks:
        return ["none"]
    have_parts = all(parts_of(block, policy) for block in blocks for policy in PARTS)
    return ["none", "blocks", *(PARTS if have_parts else ())]


def check_policy(network: nn.Module, policy: str) -> None:
    """Raise if a network cannot follow a policy; works on the meta device.

    Raises:
        ValueError: The network cannot follow the policy; names those that it can.
    """
    honoured = honoured_policies(network)
    if policy not in honoured:
        fused = [type(b).__name__ for b in repeated_blocks(network) if not all(parts_of(b, p) for p in PARTS)]
        no_parts = f"its {fused[0]} has no separate attention and feed-forward modules" if fused else ""
        raise ValueError(
            f"memory.checkpointing={policy} does not work with {type(network).__name__}: "
            f"{no_parts or 'it names no repeated blocks'}; set memory.checkpointing to one of {honoured}."
        )


def follow(network: nn.Module, policy: str, every: int = 1, offload: bool = False, runs_itself: bool = True) -> None:
    """Apply a checkpointing policy to a network, which already has its adapters.

    Args:
        policy: One of `honoured_policies(network)`.
        every: Under `blocks`, every Nth block, from the first on, is checkpointed; the others save their activations.
        offload: Keep the saved activations in host memory.
        runs_itself: Whether the network's `model_fn` turns the checkpointing of blocks on in each call (see
            `checkpoint_blocks`); `blocks` then only marks the blocks.
    """
    blocks, is_random = repeated_blocks(network), has_dropout(network)
    for number, block in enumerate(blocks):
        block.keeps_activations = number % every != 0
        for module in (block, *block.children()):
            module.may_be_random = is_random
    if policy == "blocks" and runs_itself:
        return
    recomputed = {
        "none": [],
        "blocks": [block for block in blocks if not block.keeps_activations],
        **{name: [part for block in blocks for part in parts_of(block, name)] for name in PARTS},
    }
    for part in recomputed[policy]:
        _run_through(_recompute, part)
    for block in blocks if offload else ():
        _run_through(_offload, block)


def has_dropout(network: nn.Module) -> bool:
    """Whether a network may drop activations at random: a dropout layer has p > 0, or another rate is not 0.

    Other rates are found by their names: attributes of a module or of its config with "drop" in them. That is so in
    diffusers and transformers; a network of another library counts as random.
    """
    if not any(base.__module__.split(".")[0] in LIBRARIES for base in type(network).__mro__):
        return True
    modules = list(network.modules())
    configs = [module.config for module in modules if hasattr(module, "config")]
    return any(map(_drops, modules)) or any(map(_has_rate, [*modules, *configs]))


def _drops(module: nn.Module) -> bool:
    return isinstance(module, DROPOUTS) and module.p > 0


def _has_rate(owner: Any) -> bool:
    named = owner if isinstance(owner, Mapping) else vars(owner)
    rates = [rate for name, rate in named.items() if "drop" in name]
    return any(rate for rate in rates if isinstance(rate, int | float | Mapping))  # peft has a rate for each adapter


def _run_through(function: Callable, module: nn.Module) -> None:
    module.forward = partial(function, module, module.forward)


def _recompute(module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if "past_key_values" in kwargs:  # transformers' cache: the second run would append to it again
        kwargs["past_key_values"] = None
    return gradient_checkpoint_forward(forward, torch.is_grad_enabled(), False, *args, **kwargs)


def _offload(module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with offloaded(module):
        return forward(*args, **kwargs)
