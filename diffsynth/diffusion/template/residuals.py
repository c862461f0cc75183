"""Residuals of blocks: layers of a template, whose outputs are added to an image's tokens after transformer blocks.

A layer reads the tokens that the block has computed, and a condition that the template has computed beforehand. Unlike
the samples of diffusers' ControlNets, its output is therefore known only while the transformer runs: hooks add it.
Shapes: B batch, L tokens of the sampled image, S tokens of all images, D width of the transformer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.gradient import recomputing_in
from ..pipeline import kv_cache

LAYOUT = "a dict of layers (modules by block), condition (a tensor) and, if it is not 1, scale (a number)"


@dataclass(frozen=True)
class BlockResiduals:
    """What one template adds after blocks: scale · layer(tokens, condition).

    Args:
        layers: By block, a module of two tensors (B, L, D) that returns one: the image's tokens and the condition.
        condition: (B, L, D).
        scale: Factor of what is added.
    """

    layers: Mapping[str, nn.Module]
    condition: Tensor
    scale: float = 1.0


def read(value: Any, network: nn.Module, source: str) -> tuple[BlockResiduals, ...]:
    """Convert a template's `block_residuals`, or a list of those of several, to `BlockResiduals`.

    Raises:
        ValueError: One has another layout, names a block that `network` does not have, or has another width.
    """
    return tuple(_read_one(one, network, source) for one in (value if isinstance(value, list) else [value]))


def _read_one(value: Any, network: nn.Module, source: str) -> BlockResiduals:
    names = value.keys() if isinstance(value, Mapping) else {type(value).__name__}
    if not {"layers", "condition"} <= names <= {"layers", "condition", "scale"}:
        raise ValueError(f"{source}: block_residuals has {', '.join(map(str, names))}; expected {LAYOUT}.")
    found, known = BlockResiduals(**value), kv_cache.blocks_of(network)
    _check_layers(found.layers, known, f"{source}: block_residuals", network)
    if not isinstance(found.scale, int | float):
        raise ValueError(f"{source}: block_residuals has scale {found.scale!r}, expected a number.")
    heads, head_dim = next(iter(known.values()))
    shape = tuple(found.condition.shape) if isinstance(found.condition, Tensor) else type(found.condition).__name__
    if not isinstance(shape, tuple) or len(shape) != 3 or shape[0] != 1 or shape[2] != heads * head_dim:
        raise ValueError(
            f"{source}: block_residuals has condition {shape}, expected a tensor of (1, length, {heads * head_dim})."
        )
    kv_cache.check_finite({"condition of block_residuals": found.condition}, source)
    return found


def _check_layers(layers: Any, known: Mapping[str, Any], what: str, network: nn.Module) -> None:
    if not isinstance(layers, Mapping) or not all(isinstance(layer, nn.Module) for layer in layers.values()):
        raise ValueError(f"{what} has layers {type(layers).__name__}, expected a dict of modules by block.")
    for block in layers:
        if block not in known:
            raise ValueError(f"{what} has {block!r}, {kv_cache.unknown_block(block, known, network)}")


def merge(values: Sequence[Any]) -> list:
    """The residuals of several templates as one list; they add up."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def batched(samples: Sequence[Sequence[BlockResiduals]]) -> list[BlockResiduals]:
    """The residuals of each template for a batch, from those of each sample.

    Raises:
        ValueError: The samples have other layers or scales, or conditions of other lengths.
    """
    if len({len(sample) for sample in samples}) > 1:
        raise ValueError("block_residuals: samples of a batch have those of several templates; set micro_batch_size=1.")
    return [_stacked(of_template) for of_template in zip(*samples, strict=True)]


def _stacked(samples: Sequence[BlockResiduals]) -> BlockResiduals:
    first, *others = samples
    if not others:
        return first
    alike = ((one.layers, one.scale, one.condition.shape) for one in samples)
    if any(one != (first.layers, first.scale, first.condition.shape) for one in alike):
        raise ValueError(
            "block_residuals: samples of a batch differ in layers, scale or length of the condition; set "
            "micro_batch_size=1."
        )
    return replace(first, condition=torch.cat([one.condition for one in samples]))


@contextmanager
def added(
    network: nn.Module, samples: Sequence[Sequence[BlockResiduals]] | None, own: int, tokens: int
) -> Iterator[None]:
    """Inside, a forward of `network` adds the residuals; so does its recomputation under checkpointing, later.

    Args:
        samples: The residuals of each sample.
        own: Number L of tokens of the sampled image, which come first.
        tokens: Number S of tokens of all images.

    Raises:
        ValueError: A condition has another length than the sampled image.
    """
    if not samples:
        yield
        return
    by_block: dict[str, list[BlockResiduals]] = {}
    for residuals in batched(samples):
        if (length := residuals.condition.shape[1]) != own:
            raise ValueError(
                f"block_residuals has a condition of {length} tokens, but the image has {own}; make it of the sample's "
                "height and width, which process_inputs gets if it names them."
            )
        for block in residuals.layers:
            by_block.setdefault(block, []).append(residuals)
    blocks = _modules(network)
    hooks = {blocks[name]: partial(_add, name, residuals, tokens) for name, residuals in by_block.items()}
    with _hooked(hooks, network), recomputing_in(partial(_hooked, hooks)):
        yield


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks by their names: each is what contains the attention that has the name."""
    layers = [(path, getattr(layer, "processor", None)) for path, layer in network.named_modules()]
    readers = [(path, processor) for path, processor in layers if isinstance(processor, kv_cache.KVCacheReader)]
    return {processor.block: network.get_submodule(path.rpartition(".")[0]) for path, processor in readers}


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Any], part: nn.Module) -> Iterator[None]:
    """Inside, the blocks that are in `part` have their hooks."""
    handles = [block.register_forward_hook(hooks[block]) for block in part.modules() if block in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    name: str, residuals: Sequence[BlockResiduals], tokens: int, block: nn.Module, _: tuple, output: tuple
) -> tuple[Tensor, ...]:
    *text, image = output  # (B, S, D)
    if image.shape[1] != tokens:
        raise ValueError("block_residuals needs all tokens of an image, but cp_size splits them; set cp_size=1.")
    own = image[:, : residuals[0].condition.shape[1]]
    sums = sum(one.scale * one.layers[name](own, one.condition) for one in residuals)
    return *text, torch.cat([own + sums.to(own), image[:, own.shape[1] :]], dim=1)
