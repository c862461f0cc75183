"""What other programs make of an adapter file, stated in our own words or by the program itself.

Each judge returns the updates that a program adds to the weights, (outputs, inputs) by our names of the layers; that
of a DoRA has its magnitudes as a further column.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from miniatures import wan_original
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

PIPELINES = {
    "emoji": diffusers.QwenImagePipeline,
    "emoji_flux2": diffusers.Flux2KleinPipeline,
    "krea2": diffusers.Krea2Pipeline,
    "ernie_image": diffusers.ErnieImagePipeline,
    "sd3_5_medium": diffusers.StableDiffusion3Pipeline,
    "wan21_t2v_1_3b": diffusers.WanPipeline,
    "anima": diffusers.AnimaModularPipeline,
}
Updates = dict[str, Tensor]


def in_diffusers(file: Path, network: nn.Module, family: str) -> Updates:
    """diffusers itself: `load_lora_weights` into a network of the same configuration. It raises for some files."""
    fresh, pipeline = type(network).from_config(network.config), PIPELINES[family]
    try:
        _pipeline_of(pipeline, fresh).load_lora_weights(str(file))
    except (ValueError, KeyError):
        return {}
    return updates_of(fresh)


def _pipeline_of(kind: type, network: nn.Module) -> object:
    """A pipeline with no more than a transformer."""
    if not issubclass(kind, diffusers.ModularPipeline):
        parameters = inspect.signature(kind).parameters.items()
        parts = [name for name, parameter in parameters if parameter.default is inspect.Parameter.empty]
        return kind(**dict.fromkeys(parts) | {"transformer": network})
    pipe = diffusers.AnimaAutoBlocks().init_pipeline()
    pipe.update_components(transformer=network)
    return pipe


def updates_of(network: nn.Module) -> Updates:
    """The updates of a network's one adapter."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: _update_of(layer, layer.active_adapters[0]).detach() for name, layer in layers.items()}


def _update_of(layer: BaseTunerLayer, adapter: str) -> Tensor:
    update, magnitudes = layer.get_delta_weight(adapter), getattr(layer, "lora_magnitude_vector", {})
    return torch.cat([update, magnitudes[adapter].weight[:, None]], 1) if adapter in magnitudes else update


def in_diffsynth(file: Path, network: nn.Module, family: str) -> Updates:
    """DiffSynth-Studio fed7b18, diffsynth/utils/lora/general.py: names of layers bare or after `diffusion_model.`.

    It looks for `lora_B` or `lora_up`, skips a name of the adapter after it, and multiplies by alpha / rank. Layers of
    other names, and other kinds of adapters, are left out without a message. Its Krea 2 has Krea's names of layers, its
    Wan Wan's, and its Anima NVIDIA's.
    """
    tensors, found = {} if family == "krea2" else load_file(file), {}
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    name_of = {"wan21_t2v_1_3b": _of_wan, "anima": _of_nvidia}.get(family, lambda name: f"diffusion_model.{name}")
    own = {name_of(name): name for name in linear}
    for key, up in tensors.items():
        named = re.fullmatch(r"(?:diffusion_model\.)?(.*)\.(lora_B|lora_up)(\.\w+)?\.weight", key)
        layer = own.get(f"diffusion_model.{named[1]}") if named else None
        if layer is not None:
            down = tensors[key.replace("lora_B", "lora_A").replace("lora_up", "lora_down")]
            alpha = tensors.get(re.sub(r"(lora_B|lora_up)(\.default)?\.weight$", "alpha", key))
            found[layer] = up @ down * (1 if alpha is None else alpha / len(down))
    return found


def in_comfyui(file: Path, network: nn.Module, family: str) -> Updates:
    """ComfyUI, comfy/lora.py (model_lora_keys_unet, load_lora) and comfy/weight_adapter/ of 2026.

    For each name of a layer it looks for the endings below, and multiplies by alpha / rank, or by 1 without an alpha.
    Keys that are not looked for are skipped.
    """
    tensors, found = load_file(file), {}
    for name, layer in comfyui_names(network, family).items():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora_B.default", "lora_A.default")):
            if f"{up}.weight" in parts:
                a, b = parts[f"{down}.weight"], parts[f"{up}.weight"]
                found[layer] = b @ a * parts.get("alpha", torch.tensor(len(a))) / len(a)
        if "hada_w1_a" in parts or any(part.startswith("lokr_") for part in parts):
            found[layer] = lycoris_update(parts)
        if "adaLN_modulation" in name and parts:  # the scale is before the shift in diffusers' layer
            found[layer] = torch.cat(found[layer].chunk(2)[::-1])
        if "dora_scale" in parts:
            found[layer] = torch.cat([found[layer], parts["dora_scale"]], 1)
    return found


def lycoris_update(parts: Mapping[str, Tensor]) -> Tensor:
    """LyCORIS's update; the scale is not applied to a Kronecker product of two whole matrices."""
    rank = next((len(parts[name]) for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts), None)
    scale = parts["alpha"] / rank if rank and "alpha" in parts else 1
    if "hada_w1_a" in parts:
        return scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    whole = {n: parts.get(f"lokr_w{n}") for n in "12"}
    left, right = (parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"] if w is None else w for n, w in whole.items())
    return scale * torch.kron(left, right)


def comfyui_names(network: nn.Module, family: str) -> dict[str, str]:
    """ComfyUI's names, and the layer here of each; those of fused layers, whose update has no single layer, left out.

    Its Qwen-Image has our names of layers, and they may stand alone or after `transformer.` or `diffusion_model.`.
    Its FLUX.2 has Black Forest Labs' names, which stand after `diffusion_model.`, and a list of ours
    (comfy/utils.py flux_to_diffusers), which stand alone or after `transformer.`. Its Krea 2 has Krea's names after
    `diffusion_model.`, and ours anywhere (krea2_to_diffusers). Its ERNIE-Image has ours, which do not stand alone.
    Its Stable Diffusion 3 has Stability AI's names after `diffusion_model.`, and ours (comfy/utils.py
    mmdit_to_diffusers) after `transformer.` only. Its Wan has Wan's names, which do not stand alone, and its Anima
    NVIDIA's names after `diffusion_model.` alone.
    """
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if family in STARTS:
        ours = {f"{start}{layer}": layer for layer in layers for start in STARTS[family]}
        native = NATIVE.get(family)
        return ours | ({native(layer): layer for layer in layers} if native else {})
    listed = r"(single_)?transformer_blocks\..*|x_embedder|context_embedder|proj_out|norm_out\.linear"
    ours = [layer for layer in layers if re.fullmatch(listed, layer)]
    named = {f"{start}{layer}": layer for layer in ours for start in ("", "transformer.")}
    return named | {f"diffusion_model.{_native(layer)}": layer for layer in layers}


STARTS = {
    "emoji": ("", "transformer.", "diffusion_model."),
    "krea2": ("", "transformer.", "diffusion_model."),
    "ernie_image": ("transformer.", "diffusion_model."),
    "sd3_5_medium": ("transformer.",),
    "wan21_t2v_1_3b": (),
    "anima": (),
}


def _of_krea(layer: str) -> str:
    """Krea's name of a layer of Krea 2."""
    for ours, name in (
        ("transformer_blocks.", "blocks."),
        ("text_fusion.", "txtfusion."),
        (".attn.to_gate", ".attn.gate"),
        (".attn.to_out.0", ".attn.wo"),
        (".attn.to_", ".attn.w"),
        (".ff.", ".mlp."),
        ("img_in", "first"),
        ("final_layer.", "last."),
        ("time_embed.linear_1", "tmlp.0"),
        ("time_embed.linear_2", "tmlp.2"),
        ("time_mod_proj", "tproj.1"),
        ("txt_in.linear_1", "txtmlp.1"),
        ("txt_in.linear_2", "txtmlp.3"),
    ):
        layer = layer.replace(ours, name)
    return f"diffusion_model.{layer}"


def _of_nvidia(layer: str) -> str:
    """NVIDIA's name of a layer of Anima."""
    for ours, name in (
        ("transformer_blocks.", "blocks."),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        ("to_out.0", "output_proj"),
        ("norm1.linear_", "adaln_modulation_self_attn."),
        ("norm2.linear_", "adaln_modulation_cross_attn."),
        ("norm3.linear_", "adaln_modulation_mlp."),
        ("ff.net.0.proj", "mlp.layer1"),
        ("ff.net.2", "mlp.layer2"),
        ("norm_out.linear_", "final_layer.adaln_modulation."),
        ("proj_out", "final_layer.linear"),
        ("time_embed.t_embedder", "t_embedder.1"),
        ("patch_embed.proj", "x_embedder.proj.1"),
    ):
        layer = layer.replace(ours, name)
    return "diffusion_model." + re.sub(r"to_([qkv])$", r"\1_proj", layer)


def _native_sd3(layer: str) -> str:
    """Stability AI's name of a layer that it does not fuse with others."""
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", layer)
    stream, name = {
        "attn.to_out.0": ("x_block", "attn.proj"),
        "attn.to_add_out": ("context_block", "attn.proj"),
        "attn2.to_out.0": ("x_block", "attn2.proj"),
        "ff.net.0.proj": ("x_block", "mlp.fc1"),
        "ff.net.2": ("x_block", "mlp.fc2"),
        "ff_context.net.0.proj": ("context_block", "mlp.fc1"),
        "ff_context.net.2": ("context_block", "mlp.fc2"),
    }.get(block[2] if block else "", ("final_layer", "linear"))
    named = f"joint_blocks.{block[1]}.{stream}.{name}" if block else f"{stream}.{name}"
    return f"diffusion_model.{named}" if stream != "final_layer" or layer == "proj_out" else f"(none) {layer}"


def _of_wan(layer: str) -> str:
    """The name of a layer in Wan's own code."""
    return f"diffusion_model.{next(iter(wan_original.transformer({f'{layer}.': torch.empty(0)})))}".rstrip(".")


NATIVE = {"krea2": _of_krea, "sd3_5_medium": _native_sd3, "wan21_t2v_1_3b": _of_wan, "anima": _of_nvidia}


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
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
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
        updates[layer].shape == update.shape and torch.allclose(updates[layer], update, atol=1e-4)
        for layer, update in expected.items()
    )
