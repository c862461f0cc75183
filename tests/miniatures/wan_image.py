"""Wan's models that continue a first frame, in miniature with random weights, and what diffusers samples with them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from miniatures import wan
from miniatures.z_image import PARTS
from PIL import Image
from tiny import kept_folder
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

CLIP_PARTS = PARTS | {"image_encoder": "image_encoder", "image_processor": "image_processor"}
CLIP_WIDTH, CLIP_TOKENS = 24, 5


@cache
def text_and_image_to_video() -> Path:
    """The folder of a model repository like Wan2.2-TI2V-5B's; written once per session."""
    parts = {"transformer": wan.transformer(in_channels=48, out_channels=48), "vae": vae_22()}
    own = {"image_encoder": None, "image_processor": None, "expand_timesteps": True}
    return wan.write(kept_folder() / "wan_ti2v", WanImageToVideoPipeline, **parts, **own)


@cache
def image_to_video() -> Path:
    """The folder of a model repository like one expert of Wan2.2-I2V's, which reads no CLIP."""
    return write("wan22_i2v", wan.transformer(in_channels=36), image_encoder=None, image_processor=None)


@cache
def two_experts() -> Path:
    """The folder of a model repository like Wan2.2-I2V-A14B's; written once per session."""
    own = {"transformer_2": wan.transformer(in_channels=36), "boundary_ratio": 0.9}
    return write("wan22_i2v_a14b", wan.transformer(in_channels=36), image_encoder=None, image_processor=None, **own)


@cache
def image_to_video_with_clip() -> Path:
    """The folder of a model repository like Wan2.1-I2V's."""
    return write("wan21_i2v", with_clip())


@cache
def first_and_last_frame() -> Path:
    """The folder of a model repository like Wan2.1-FLF2V's."""
    return write("wan21_flf2v", with_clip(pos_embed_seq_len=2 * CLIP_TOKENS))


@cache
def fun_control(in_channels: int = 48) -> Path:
    """The folder of a model repository like Wan2.1-Fun-Control's in the layout of diffusers."""
    return write(f"wan_fun_{in_channels}", with_clip(in_channels))


def write(name: str, transformer: WanTransformer3DModel, **own: object) -> Path:
    folder = kept_folder() / name
    clip = {"image_encoder": clip_vision(), "image_processor": processor()}
    return wan.write(folder, WanImageToVideoPipeline, transformer=transformer, **clip | own)


def with_clip(in_channels: int = 36, **sizes: int) -> WanTransformer3DModel:
    """A transformer that attends to CLIP's features; their keys and values are made of the transformer's width."""
    return wan.transformer(in_channels=in_channels, image_dim=CLIP_WIDTH, added_kv_proj_dim=64, **sizes)


def clip_vision() -> CLIPVisionModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": CLIP_WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu"))


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def vae_22() -> AutoencoderKLWan:
    """Of the released factors of Wan 2.2's autoencoder: 16 × 16 pixels, after the first 4 frames, 48 channels."""
    sizes = {"base_dim": 8, "num_res_blocks": 1, "z_dim": 48, "in_channels": 12, "out_channels": 12}
    form = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(48, generator=generator), torch.rand(48, generator=generator) + 0.5
    return AutoencoderKLWan(**sizes, **form, latents_mean=mean.tolist(), latents_std=std.tolist())


def sampled_by_diffusers(folder: Path, requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, C, T, h, w) that `WanImageToVideoPipeline` samples for requests with the same images."""
    own: dict[str, Image.Image | int] = {"image": requests[0]["input_image"]}
    own["max_sequence_length"] = requests[0].get("max_sequence_length", wan.MAX_TOKENS)
    if requests[0].get("end_image") is not None:
        own["last_image"] = requests[0]["end_image"]
    return wan.sampled_by_diffusers(requests, noise, WanImageToVideoPipeline, folder, **own)


def sampled_by_two_experts(requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, 16, T, h, w) that Wan 2.2's two experts sample."""
    return sampled_by_diffusers(two_experts(), requests, noise)


def sampled_by_ti2v(requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, 48, T, h, w) that Wan2.2-TI2V-5B samples at the size of the noise."""
    size = {"height": 16 * noise.shape[3], "width": 16 * noise.shape[4]}
    return sampled_by_diffusers(text_and_image_to_video(), [{**request, **size} for request in requests], noise)
