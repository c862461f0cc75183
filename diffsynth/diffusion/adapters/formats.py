"""Names that other programs give the tensors of a LoRA.

A format is a function of an adapter's tensors under peft's names (`blocks.0.to_q.lora_A.weight`), its configuration,
and the name that diffusers gives the model (`transformer`); it returns the tensors under the program's names.
"""

import math
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

Tensors = dict[str, Tensor]


def diffusers(tensors: Mapping[str, Tensor], config: PeftConfig, prefix: str) -> Tensors:
    """`transformer.….lora_A.weight`; diffusers reads the scale from the file's metadata."""
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def diffsynth(tensors: Mapping[str, Tensor], config: PeftConfig, prefix: str) -> Tensors:
    """`….lora_A.default.weight`; DiffSynth-Studio's format stores no scale, so that B is multiplied by it."""
    _check_kind("diffsynth", config, dora=False)
    start = "" if prefix == "transformer" else f"pipe.{prefix}."
    scaled = {key: tensor * _scale(config) if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    return {f"{start}{key.removesuffix('.weight')}.default.weight": tensor for key, tensor in scaled.items()}


def comfyui(tensors: Mapping[str, Tensor], config: PeftConfig, prefix: str) -> Tensors:
    """`diffusion_model.….lora_down.weight`, with a tensor `alpha` for each layer."""
    _check_kind("comfyui", config, dora=True)
    if prefix != "transformer":
        raise ValueError(
            f"export.formats: comfyui has names for the transformer's LoRA only, not for {prefix}'s; set "
            "export.formats=[diffusers]."
        )
    spelling = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    renamed = {}
    for key, tensor in tensors.items():
        part = next(part for part in spelling if key.endswith(part))
        layer = f"diffusion_model.{key.removesuffix(part)}"
        renamed[layer + spelling[part]] = tensor[:, None] if part == "lora_magnitude_vector" else tensor
        renamed[f"{layer}alpha"] = torch.tensor(_scale(config) * config.r, dtype=torch.float32)
    return renamed


FORMATS: dict[str, Callable[..., Tensors]] = {"diffusers": diffusers, "diffsynth": diffsynth, "comfyui": comfyui}


def check_format(name: str, config: PeftConfig, prefix: str) -> None:
    """Check, before any tensor exists, that a format has names for an adapter of this kind, of this model.

    Raises:
        ValueError: It has none.
    """
    FORMATS[name]({}, config, prefix)


def _scale(config: LoraConfig) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _check_kind(name: str, config: PeftConfig, dora: bool) -> None:
    if not isinstance(config, LoraConfig) or (config.use_dora and not dora):
        kind = "DoRA" if isinstance(config, LoraConfig) else config.peft_type.value
        raise ValueError(f"export.formats: {name} has no names for {kind}; set export.formats=[diffusers].")
