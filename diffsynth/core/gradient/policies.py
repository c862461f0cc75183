"""Which activations a network keeps for the backward pass, which it computes again, and where the kept ones wait.

Policies are laid on a network from outside, on the blocks that it says it repeats and on their attention and
feed-forward parts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .checkpoint import gradient_checkpoint_forward
from .offload import offloaded

# Names that diffusers and transformers give to the parts of a block.
PARTS = {
    "attention": ("attn", "self_attn", "attention"),
    "feed_forward": ("ff", "ff_context", "img_mlp", "txt_mlp", "mlp", "feed_forward"),
}


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers or transformers network says it repeats, in the order in which they stand in it."""
    return [block for blocks in repeated_lists(network).values() for block in blocks]


def repeated_lists(network: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists that these blocks stand in, by name."""
    kinds = {
        kind
        for module in network.modules()
        for name in ("_repeated_blocks", "_no_split_modules")
        for kind in getattr(module, name, None) or ()
    }
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    return {n: blocks for n, blocks in lists.items() if blocks and {type(block).__name__ for block in blocks} <= kinds}


def parts_of(block: nn.Module, policy: str) -> list[nn.Module]:
    """The attention, or the feed-forward parts, of a block."""
    return [part for name, part in block.named_children() if name in PARTS[policy]]


def honoured_policies(network: nn.Module) -> list[str]:
    """The policies that a network can follow; attention and feed-forward must stand apart in all of its blocks."""
    blocks = repeated_blocks(network)
    if not blocks:
        return ["none"]
    apart = all(parts_of(block, policy) for block in blocks for policy in PARTS)
    return ["none", "blocks", *(PARTS if apart else ())]


def check_policy(network: nn.Module, policy: str) -> None:
    """Refuse a policy that a network cannot follow; works on the meta device.

    Raises:
        ValueError: Names the network and the policies that it can follow.
    """
    honoured = honoured_policies(network)
    if policy not in honoured:
        fused = [type(b).__name__ for b in repeated_blocks(network) if not all(parts_of(b, p) for p in PARTS)]
        why = f"its {fused[0]} has no attention and feed-forward apart" if fused else "it names no repeated blocks"
        raise ValueError(
            f"memory.checkpointing={policy}: {type(network).__name__} cannot, as {why}; choose one of {honoured}."
        )


def follow(network: nn.Module, policy: str, every: int = 1, offload: bool = False, runs_itself: bool = True) -> None:
    """Make a network follow a policy from now on.

    Args:
        policy: One of `honoured_policies(network)`.
        every: Under `blocks`, the first of so many blocks is checkpointed, the others keep their activations.
        offload: What is kept waits in host memory.
        runs_itself: Its `model_fn` says in each call whether its blocks are checkpointed (see `checkpoint_blocks`).
    """
    blocks = repeated_blocks(network)
    for number, block in enumerate(blocks):
        block.keeps_activations = number % every != 0
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


def _run_through(function: Callable, module: nn.Module) -> None:
    module.forward = partial(function, module, module.forward)


def _recompute(module: nn.Module, forward: Callable, *args, **kwargs):
    if "past_key_values" in kwargs:  # transformers' cache, which a second run would write to again
        kwargs["past_key_values"] = None
    return gradient_checkpoint_forward(forward, torch.is_grad_enabled(), False, *args, **kwargs)


def _offload(module: nn.Module, forward: Callable, *args, **kwargs):
    with offloaded(module):
        return forward(*args, **kwargs)
