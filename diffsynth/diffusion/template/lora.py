"""LoRAs as inputs of the network: each sample of a batch may have its own; W x becomes W x + B A x."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...core.gradient import recomputing_in
from ..adapters import files as lora_files
from ..adapters.names import LayerNames, peft_names

InputLoRA = Mapping[str, tuple[Tensor, Tensor]]  # layer → A (B, r, in), B (B, out, r), scaled


def read(state_dict: Mapping[str, Tensor], network: nn.Module, names: LayerNames, source: str) -> InputLoRA:
    """Convert a LoRA's state dict to pairs A (1, r, in), B (1, out, r) by layer of `network`.

    Args:
        state_dict: Tensors under any names that adapter files have.
        names: Names of the network in adapter files.
        source: Origin of the LoRA, for errors.

    Raises:
        ValueError: A key belongs to no layer, or a layer lacks one of its matrices or has one of another shape.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(t, Tensor) for t in state_dict.values()):
        raise ValueError(f"{source}: lora is a {type(state_dict).__name__}, expected a dict of tensors by name.")
    tensors = peft_names(state_dict, names, network, source)
    lora_files.check_layers(network, tensors, f"{source}: lora", state_dict)
    layers = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors)
    for layer in layers:
        _check_layer(layer, tensors, network.get_submodule(layer), source)
    return {layer: tuple(tensors[f"{layer}.lora_{side}.weight"].unsqueeze(0) for side in "AB") for layer in layers}


def _check_layer(layer: str, tensors: Mapping[str, Tensor], module: nn.Module, source: str) -> None:
    found = [tuple(tensors[key].shape) if (key := f"{layer}.lora_{side}.weight") in tensors else None for side in "AB"]
    rank = found[0][0] if found[0] else "rank"
    expected = [(rank, module.weight.shape[1]), (module.weight.shape[0], rank)]
    if found != expected:
        raise ValueError(f"{source}: lora has A {found[0]} and B {found[1]} for {layer}, expected {expected}.")


def merge(state_dicts: Sequence[Mapping[str, Tensor]], network: nn.Module, names: LayerNames) -> dict[str, Tensor]:
    """One LoRA that adds the updates of several: their matrices (r, in) and (out, r), concatenated along the rank."""
    named = [peft_names(state_dict, names, network, "lora") for state_dict in state_dicts]
    keys = dict.fromkeys(key for tensors in named for key in tensors)
    matrices = {key: [tensors[key] for tensors in named if key in tensors] for key in keys}
    return {key: torch.cat(of_key, dim=1 if ".lora_B" in key else 0) for key, of_key in matrices.items()}


@contextmanager
def added(network: nn.Module, lora: InputLoRA | None) -> Iterator[None]:
    """Inside, a forward of `network` adds the LoRA's updates; so does its recomputation under checkpointing, later."""
    if not lora:
        yield
        return
    layers = {network.get_submodule(layer): pair for layer, pair in lora.items()}
    with _hooked(layers, network), recomputing_in(partial(_hooked, layers)):
        yield


@contextmanager
def _hooked(layers: Mapping[nn.Module, tuple[Tensor, Tensor]], part: nn.Module) -> Iterator[None]:
    """Inside, the layers that are in `part` add their updates to their outputs."""
    in_part = [layer for layer in part.modules() if layer in layers]
    hooks = [layer.register_forward_hook(partial(_add, layers[layer])) for layer in in_part]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(pair: tuple[Tensor, Tensor], layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    inputs, down, up = args[0], *(matrix.to(args[0]) for matrix in pair)
    if len(down) not in (1, len(inputs)):
        raise ValueError(
            f"{len(down)} samples have a lora each, but a {type(layer).__name__} of {tuple(layer.weight.shape)} gets "
            f"inputs of {len(inputs)} samples; set micro_batch_size=1."
        )
    update = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1)
    return output + (update @ down.mT @ up.mT).reshape(output.shape)
