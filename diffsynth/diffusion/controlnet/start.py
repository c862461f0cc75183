"""Initialises a ControlNet from a transformer; reads only the copied tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from ...core.loader.safetensors_files import read_shapes, read_tensors
from ..pipeline.components import library_name
from .family import ControlFamily

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


def start_controlnet(pipe: "BasePipeline", blocks: int | None, inpaint: bool, seed: int) -> nn.Module:
    """A ControlNet for the pipeline's transformer, in the pipeline's dtype on the CPU.

    Raises:
        ValueError: The family has no ControlNet, or the transformer has fewer blocks.
    """
    family = pipe.control_family
    if family is None:
        raise ValueError(f"{type(pipe).__name__} has no ControlNet; take a model whose family has one.")
    kind = getattr(diffusers, library_name(family.kind))  # not a subclass of ours, whose name no other program knows
    transformer = pipe.network.config
    config = family.config(transformer, number_of_blocks(blocks, family, transformer), inpaint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind.from_config(config)
    files = pipe.weight_files(pipe.in_iteration_models[0])
    shapes = {key: shape for file in files for key, shape in read_shapes(file).items()}
    sources = {name: family.source(name, network.config) for name in network.state_dict()}
    copied = {name: key for name, key in sources.items() if network.state_dict()[name].shape == shapes.get(key)}
    tensors = read_tensors(files, copied.values())
    network.load_state_dict({name: tensors[key] for name, key in copied.items()}, strict=False)
    return nn.Module.to(network, pipe.torch_dtype)  # diffusers' own method warns of what has no effect here


def number_of_blocks(blocks: int | None, family: ControlFamily, transformer: Mapping[str, Any]) -> int:
    """Number of blocks to copy: `blocks`, or the family's number if the transformer has so many.

    Raises:
        ValueError: The transformer has fewer.
    """
    count = transformer[family.layers]
    if blocks is None:
        return min(family.blocks, count)
    if blocks > count:
        raise ValueError(
            f"blocks={blocks}, but the transformer has {count} blocks to copy; set blocks={count} or less, or leave it "
            f"out for {min(family.blocks, count)}."
        )
    return blocks
