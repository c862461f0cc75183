"""What other programs make of an adapter file, stated in our own words or by the program itself.

Each judge returns the updates that a program adds to the weights, (outputs, inputs) by our names of the layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

PIPELINES = {"emoji": diffusers.QwenImagePipeline, "emoji_flux2": diffusers.Flux2KleinPipeline}
Updates = dict[str, Tensor]


def in_diffusers(file: Path, network: nn.Module, family: str) -> Updates:
    """diffusers itself: `load_lora_weights` into a network of the same configuration. It raises for some files."""
    fresh, pipeline = type(network).from_config(network.config), PIPELINES[family]
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    try:
        pipeline(**parts, transformer=fresh).load_lora_weights(str(file))
    except (ValueError, KeyError):
        return {}
    layers = {name: layer for name, layer in fresh.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


def in_diffsynth(file: Path, network: nn.Module, family: str) -> Updates:
    """DiffSynth-Studio fed7b18, diffsynth/utils/lora/general.py: names of layers bare or after `diffusion_model.`.

    It looks for `lora_B` or `lora_up`, skips a name of the adapter after it, and multiplies by alpha / rank. Layers of
    other names, and other kinds of adapters, are left out without a message.
    """
    tensors, found = load_file(file), {}
    for key, up in tensors.items():
        named = re.fullmatch(r"(?:diffusion_model\.)?(.*)\.(lora_B|lora_up)(\.\w+)?\.weight", key)
        if named and isinstance(dict(network.named_modules()).get(named[1]), nn.Linear):
            down = tensors[key.replace("lora_B", "lora_A").replace("lora_up", "lora_down")]
            alpha = tensors.get(re.sub(r"(lora_B|lora_up)(\.default)?\.weight$", "alpha", key))
            found[named[1]] = up @ down * (1 if alpha is None else alpha / len(down))
    return found


def in_comfyui(file: Path, network: nn.Module, family: str) -> Updates:
    """ComfyUI, comfy/lora.py (model_lora_keys_unet, load_lora) and comfy/weight_adapter/lora.py of 2026.

    For each name of a layer it looks for the pairs of endings below, and multiplies by alpha / rank. Keys that are not
    looked for are skipped.
    """
    tensors, found = load_file(file), {}
    pairs = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora_B.default", "lora_A.default"))
    for name, layer in comfyui_names(network, family).items():
        for up, down in pairs:
            if f"{name}.{up}.weight" in tensors:
                a, b = tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"]
                found[layer] = b @ a * tensors.get(f"{name}.alpha", torch.tensor(len(a))) / len(a)
    return found


def comfyui_names(network: nn.Module, family: str) -> dict[str, str]:
    """ComfyUI's names, and the layer here of each; those of fused layers, whose update has no single layer, left out.

    Its Qwen-Image has our names of layers, and they may stand alone or after `transformer.` or `diffusion_model.`.
    Its FLUX.2 has Black Forest Labs' names, which stand after `diffusion_model.`, and a list of ours
    (comfy/utils.py flux_to_diffusers), which stand alone or after `transformer.`.
    """
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if family == "emoji":
        return {f"{start}{layer}": layer for layer in layers for start in ("", "transformer.", "diffusion_model.")}
    listed = r"(single_)?transformer_blocks\..*|x_embedder|context_embedder|proj_out|norm_out\.linear"
    ours = [layer for layer in layers if re.fullmatch(listed, layer)]
    named = {f"{start}{layer}": layer for layer in ours for start in ("", "transformer.")}
    return named | {f"diffusion_model.{_native(layer)}": layer for layer in layers}


def _native(layer: str) -> str:
    """Black Forest Labs' name of a layer of FLUX.2, where they have one of its own."""
    for pattern, name in (
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
        (r"(double|single)_stream_modulation(.*)\.linear", r"\1_stream_modulation\2.lin"),
        (r"time_guidance_embed\.(time|guidance)\w*_embedder\.linear_1", r"\1_in.in_layer"),
        (r"time_guidance_embed\.(time|guidance)\w*_embedder\.linear_2", r"\1_in.out_layer"),
        (r"x_embedder", "img_in"),
        (r"context_embedder", "txt_in"),
        (r"proj_out", "final_layer.linear"),
    ):
        if re.fullmatch(pattern, layer):
            return re.sub(pattern, name, layer)
    return f"(no name of its own) {layer}"


PROGRAMS = {"diffusers": in_diffusers, "ComfyUI": in_comfyui, "DiffSynth-Studio": in_diffsynth}


def programs_that_load(file: Path, network: nn.Module, family: str, expected: Mapping[str, Tensor]) -> set[str]:
    """The programs that add exactly the expected updates."""
    found = {name: judge(file, network, family) for name, judge in PROGRAMS.items()}
    return {name for name, updates in found.items() if are_equal(updates, expected)}


def are_equal(updates: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return updates.keys() == expected.keys() and all(
        torch.allclose(updates[layer], update, atol=1e-5) for layer, update in expected.items()
    )
