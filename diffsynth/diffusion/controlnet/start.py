"""Initialises a ControlNet from a transformer; reads only the copied tensors."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import diffusers
import torch
from torch import nn

from ...core.loader.safetensors_files import read_shapes, read_tensors
from ..pipeline.components import library_name

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


BLOCK = re.compile(r"\w+\.\d+")  # a block of a list, such as layers.3


def start_controlnet(pipe: "BasePipeline", blocks: int | None, inpaint: bool, seed: int) -> nn.Module:
    """A ControlNet for the pipeline's transformer, in the pipeline's dtype on the CPU.

    Raises:
        ValueError: The family has no ControlNet, or the transformer has fewer blocks.
    """
    family = pipe.control_family
    if family is None:
        raise ValueError(f"{type(pipe).__name__} has no ControlNet; take a model whose family has one.")
    kind = getattr(diffusers, library_name(family.kind))  # not a subclass of ours, whose name no other program knows
    config = family.config(pipe.network.config, family.blocks if blocks is None else blocks, inpaint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind.from_config(config)
    files = pipe.weight_files(pipe.in_iteration_models[0])
    shapes = {key: shape for file in files for key, shape in read_shapes(file).items()}
    sources = {name: family.source(name, network.config) for name in network.state_dict()}
    _check_blocks(sources.values(), shapes)
    copied = {name: key for name, key in sources.items() if network.state_dict()[name].shape == shapes.get(key)}
    tensors = read_tensors(files, copied.values())
    network.load_state_dict({name: tensors[key] for name, key in copied.items()}, strict=False)
    return nn.Module.to(network, pipe.torch_dtype)  # diffusers' own method warns of what has no effect here


def _check_blocks(sources: Iterable[str], held: Iterable[str]) -> None:
    """Refuse to copy blocks of a list that the transformer's file does not have."""
    found, wanted = ({match[0] for match in map(BLOCK.match, keys) if match} for keys in (held, sources))
    lists = {block.partition(".")[0] for block in found}
    if beyond := sorted(block for block in wanted - found if block.partition(".")[0] in lists):
        name = beyond[0].partition(".")[0]
        count = sum(block.startswith(f"{name}.") for block in found)
        raise ValueError(
            f"blocks: the transformer has {count} {name} to copy, and {beyond[0]} is beyond them; set fewer."
        )
