"""Names that other programs give the tensors of a LoRA.

Every format starts from peft's names (`blocks.0.to_q.lora_A.weight`), the adapter's configuration, and the name that
diffusers gives the model (`transformer`).
"""

import math
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig
from torch import Tensor

Tensors = dict[str, Tensor]


def diffusers(tensors: Mapping[str, Tensor], config, prefix: str) -> Tensors:
    """`transformer.….lora_A.weight`; the scale is read from the file's metadata."""
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def diffsynth(tensors: Mapping[str, Tensor], config, prefix: str) -> Tensors:
    """`….lora_A.default.weight`, which knows no scale: it is folded into B."""
    _check_kind("diffsynth", config, dora=False)
    start = "" if prefix == "transformer" else f"pipe.{prefix}."
    scaled = {key: tensor * _scale(config) if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    return {f"{start}{key.removesuffix('.weight')}.default.weight": tensor for key, tensor in scaled.items()}


def comfyui(tensors: Mapping[str, Tensor], config, prefix: str) -> Tensors:
    """`diffusion_model.….lora_down.weight`, with `alpha` beside each layer."""
    _check_kind("comfyui", config, dora=True)
    if prefix != "transformer":
        raise ValueError(f"export.formats: comfyui has names for the transformer's LoRA only, not for {prefix}'s.")
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


def _scale(config: LoraConfig) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _check_kind(name: str, config, dora: bool) -> None:
    if not isinstance(config, LoraConfig) or (config.use_dora and not dora):
        kind = "DoRA" if isinstance(config, LoraConfig) else config.peft_type.value
        raise ValueError(f"export.formats: {name} has no names for {kind}; export.formats=[diffusers] has.")
