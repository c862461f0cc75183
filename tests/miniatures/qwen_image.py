"""Qwen-Image in miniature with a ControlNet of random weights; what diffusers samples with it."""

import shutil
from functools import cache
from pathlib import Path

import diffusers
import tiny
import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from miniatures.autoencoders import encoding_to_means
from tiny_flux2 import randomise
from torch import Tensor

PARTS = tiny.COMPONENTS | {"controlnet": "controlnet"}
INPAINT_CHANNELS = 4


@cache
def controlled() -> Path:
    """The folder of `tiny.model()`, with a ControlNet; written once per session."""
    folder = tiny.kept_folder() / "qwen_image_controlled"
    shutil.copytree(tiny.model(), folder)
    shutil.copytree(controlnet(), folder / "controlnet")
    return folder


@cache
def controlnet(extra_channels: int = 0) -> Path:
    """The folder of a ControlNet for `tiny.model()` with random weights; written once each."""
    folder = tiny.kept_folder() / f"qwen_controlnet_{extra_channels}"
    config = QwenImageTransformer2DModel.load_config(tiny.model() / "transformer")
    sizes = {n: config[n] for n in ("num_attention_heads", "attention_head_dim", "joint_attention_dim")}
    torch.manual_seed(0)
    network = QwenImageControlNetModel(
        num_layers=2, axes_dims_rope=config["axes_dims_rope"], extra_condition_channels=extra_channels, **sizes
    )
    randomise(network, folder)
    return folder


def sampled_by_diffusers(requests: list[dict], noise: Tensor) -> Tensor:
    """The latents (B, 16, h, w) that QwenImageControlNetPipeline, or that for inpainting, samples for some requests."""
    first = requests[0]
    inpaint = first.get("controlnet_inpaint_mask")
    kind = diffusers.QwenImageControlNetInpaintPipeline if inpaint else diffusers.QwenImageControlNetPipeline
    network = QwenImageControlNetModel.from_pretrained(controlnet(INPAINT_CHANNELS if inpaint else 0))
    pipe = kind.from_pretrained(tiny.model(), controlnet=network, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": [r["prompt"] for r in requests], "negative_prompt": [r["negative_prompt"] for r in requests]}
    options |= {name: first[name] for name in ("height", "width", "num_inference_steps")}
    options |= {"control_image": first["controlnet_image"], "controlnet_conditioning_scale": first["controlnet_scale"]}
    options |= {"control_mask": inpaint} if inpaint else {}
    packed = pipe._pack_latents(noise, *noise.shape)
    with encoding_to_means():
        found = pipe(**options, true_cfg_scale=first["cfg_scale"], latents=packed, output_type="latent").images
    return pipe._unpack_latents(found, first["height"], first["width"], pipe.vae_scale_factor)[:, :, 0]
