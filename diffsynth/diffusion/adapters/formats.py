"""Names that other programs give the tensors of an adapter.

A format is a function of an adapter's tensors under peft's names (`blocks.0.to_q.lora_A.weight`), its configuration,
and the network's `LayerNames`; it returns the tensors under the program's names. docs/runs.md has the table of the
programs that load each format.
"""

import math
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from .names import LayerNames
from .update import by_layer, scaled_layers, with_halves_swapped

Tensors = dict[str, Tensor]


def common(tensors: Mapping[str, Tensor], config: PeftConfig, names: LayerNames) -> Tensors:
    """The names that most programs read; no scale is left for metadata, which only diffusers reads."""
    scaled = scaled_layers(tensors, scale(config))
    if kind(config) == "LORA" and names.common != "diffusers":
        return comfyui(tensors, config, names) if names.common == "comfyui" else _with(names.in_comfyui, scaled)
    return diffusers(scaled, config, names)


def _with(name: Callable[[str], str], tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under other names of their layers."""
    layers = by_layer(tensors).items()
    return {f"{name(layer)}.{part}": tensor for layer, parts in layers for part, tensor in parts.items()}


def diffusers(tensors: Mapping[str, Tensor], config: PeftConfig, names: LayerNames) -> Tensors:
    """`transformer.….lora_A.weight`; diffusers reads the scale from the file's metadata."""
    return {f"{names.written}.{key}": tensor for key, tensor in tensors.items()}


def diffsynth(tensors: Mapping[str, Tensor], config: PeftConfig, names: LayerNames) -> Tensors:
    """`….lora_A.default.weight`; DiffSynth-Studio's format stores no scale, so that B is multiplied by it."""
    start = "" if names.written == "transformer" or names.studio == "original" else f"pipe.{names.written}."
    scaled = _with(names.in_studio, scaled_layers(tensors, scale(config))).items()
    return {f"{start}{key.removesuffix('.weight')}.default.weight": tensor for key, tensor in scaled}


def comfyui(tensors: Mapping[str, Tensor], config: PeftConfig, names: LayerNames) -> Tensors:
    """ComfyUI's names of the layers with `lora_down.weight`, `lora_up.weight` and a tensor `alpha` for each."""
    spelling = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    renamed = {}
    for layer, parts in by_layer(tensors).items():
        name = names.in_comfyui(layer)
        for part, tensor in (with_halves_swapped(parts) if names.is_swapped(name) else parts).items():
            renamed[f"{name}.{spelling[part]}"] = tensor[:, None] if part == "lora_magnitude_vector" else tensor
        renamed[f"{name}.alpha"] = torch.tensor(scale(config) * config.r, dtype=torch.float32)
    return renamed


ADAPTER_FILE = "lora"  # name of the exported file that holds adapters, and the beginning of names of further ones
FORMATS: dict[str, Callable[..., Tensors]] = {
    "common": common,
    "diffusers": diffusers,
    "diffsynth": diffsynth,
    "comfyui": comfyui,
}
KINDS = {
    "common": ("LORA", "DoRA", "LOHA", "LOKR"),
    "diffusers": ("LORA", "DoRA", "LOHA", "LOKR"),
    "diffsynth": ("LORA",),
    "comfyui": ("LORA", "DoRA"),
}


def check_holds(format: str, config: PeftConfig, prefix: str) -> None:
    """Refuse a format that has no names for an adapter; needs neither the adapter nor the model.

    Args:
        format: A key of `FORMATS`.
        config: The adapter's configuration, of any layers: `lora.peft_config([])`.
        prefix: diffusers' name of the network that is adapted.

    Raises:
        ValueError: The format has no names for this kind of adapter, or for this network.
    """
    if kind(config) not in KINDS[format]:
        raise ValueError(f"export.formats: {format} has no names for {kind(config)}; set export.formats=[common].")
    if format == "comfyui" and prefix != "transformer":
        raise ValueError(
            f"export.formats: comfyui has names for the transformer's LoRA only, not for {prefix}'s; set "
            "export.formats=[common]."
        )


def kind(config: PeftConfig) -> str:
    """`LORA`, `DoRA`, `LOHA` or `LOKR`."""
    return "DoRA" if isinstance(config, LoraConfig) and config.use_dora else config.peft_type.value


def scale(config: PeftConfig) -> float:
    """Factor of the update: alpha / rank, or alpha / √rank with rsLoRA."""
    if isinstance(config, LoraConfig):
        return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return config.alpha / config.r
