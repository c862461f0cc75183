"""Wan's VACE in miniature with random weights, and what diffusers samples with it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from miniatures import wan
from tiny import kept_folder
from torch import Tensor


@cache
def folder() -> Path:
    """The folder of a model repository like Wan2.1-VACE's; written once per session."""
    return wan.write(kept_folder() / "wan_vace", WanVACEPipeline, transformer=transformer())


def transformer() -> WanVACETransformer3DModel:
    small = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "num_layers": 2, "freq_dim": 32}
    return WanVACETransformer3DModel(**small, text_dim=wan.TEXT_WIDTH, vace_layers=[0, 1])


def sampled_by_diffusers(requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, 16, k + T, h, w) that WanVACEPipeline samples; it samples one request at a time."""
    return torch.cat([_sampled(request, own) for request, own in zip(requests, noise.split(1), strict=True)])


def _sampled(request: Mapping, noise: Tensor) -> Tensor:
    names = {"video": "vace_video", "mask": "vace_video_mask", "reference_images": "vace_reference_image"}
    given = {name: request[own] for name, own in names.items() if own in request}
    pipe = wan.pipeline(WanVACEPipeline, folder())
    return pipe(
        **{name: request[name] for name in ("prompt", "negative_prompt", "height", "width", "num_inference_steps")},
        **given,
        num_frames=1 + 4 * (noise.shape[2] - 1 - ("reference_images" in given)),
        guidance_scale=request["cfg_scale"],
        conditioning_scale=request.get("vace_scale", 1.0),
        max_sequence_length=wan.MAX_TOKENS,
        latents=noise,
        output_type="latent",
        return_dict=False,
    )[0]
