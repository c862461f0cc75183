"""Wan's models that continue a first frame, in miniature with random weights, and what diffusers samples with them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from miniatures import wan
from miniatures.z_image import PARTS
from PIL import Image
from tiny import kept_folder
from torch import Tensor

__all__ = ["PARTS", "sampled_by_diffusers", "text_and_image_to_video"]


@cache
def text_and_image_to_video() -> Path:
    """The folder of a model repository like Wan2.2-TI2V-5B's; written once per session."""
    parts = {"transformer": wan.transformer(in_channels=48, out_channels=48), "vae": vae_22()}
    own = {"image_encoder": None, "image_processor": None, "expand_timesteps": True}
    return wan.write(kept_folder() / "wan_ti2v", WanImageToVideoPipeline, **parts, **own)


def vae_22() -> AutoencoderKLWan:
    """Of the released factors of Wan 2.2's autoencoder: 16 × 16 pixels, after the first 4 frames, 48 channels."""
    sizes = {"base_dim": 8, "num_res_blocks": 1, "z_dim": 48, "in_channels": 12, "out_channels": 12}
    form = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(48, generator=generator), torch.rand(48, generator=generator) + 0.5
    return AutoencoderKLWan(**sizes, **form, latents_mean=mean.tolist(), latents_std=std.tolist())


def sampled_by_diffusers(folder: Path, requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, C, T, h, w) that `WanImageToVideoPipeline` samples for requests with the same images."""
    own: dict[str, Image.Image] = {"image": requests[0]["input_image"]}
    if requests[0].get("end_image") is not None:
        own["last_image"] = requests[0]["end_image"]
    return wan.sampled_by_diffusers(requests, noise, WanImageToVideoPipeline, folder, **own)
