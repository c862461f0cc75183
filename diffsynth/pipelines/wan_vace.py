"""Wan's VACE: videos that are edited, extended, controlled or made from reference images; Wan2.1-VACE-1.3B and -14B.

Jiang et al. 2025, "VACE: All-in-One Video Creation and Editing" (https://arxiv.org/abs/2503.07598). The transformer has
further blocks, which read a context of 96 channels: the latents of the video outside of the mask (16) and inside of it
(16), and the mask itself (8 × 8 pixels as 64 channels). Latents of reference images are put in front of the frames;
those that are sampled there are dropped. Constants are those of diffusers' WanVACEPipeline, which binarises masks; here
they keep soft edges, as in DiffSynth-Studio. There, a later reference image comes first; here the first one does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel
from PIL import Image
from torch import Tensor

from ..core.data.operators.picture_files import in_mode
from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat
from ..diffusion.pipeline.components import Network
from ..diffusion.pipeline.image_units import image_list
from ..diffusion.pipeline.request import Frames
from ..diffusion.pipeline.units import PipelineUnit
from ..diffusion.pipeline.video_units import (
    InputVideoEmbedder,
    VideoLossMask,
    VideoNoiseInitializer,
    VideoShapeChecker,
    behind,
    encode_videos,
)
from .layouts.wan import LORA_NAMES, TRANSFORMER_LAYOUT
from .wan import WanPipeline, WanRequest, WanUnit_PromptEmbedder

__all__ = ["ModelConfig", "WanVACEPipeline"]


def model_fn_wan_vace(
    dit: WanVACETransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    vace_context: Tensor,
    vace_scale: float = 1.0,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, k + T, h, w) of noisy latents (B, 16, k + T, h, w) at timesteps (B,) in [0, 1000].

    The first k frames are those of reference images.

    Args:
        prompt_emb: Text embeddings (B, L, D), zeros after the prompt's end.
        vace_context: Latents and mask (B, 96, k + T, h, w) of the video that is edited.
        vace_scale: Factor of what the further blocks add.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    return dit(
        hidden_states=latents.to(dit.dtype),
        timestep=timestep,
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        control_hidden_states=vace_context.to(dit.dtype),
        control_hidden_states_scale=latents.new_full((len(dit.config.vace_layers),), vace_scale, dtype=dit.dtype),
        return_dict=False,
    )[0]


# Units ----------------------------------------------------------------------------------------------------------------


class WanUnit_References(PipelineUnit):
    """Encodes the reference images to `reference_latents` (1, 16, k, h, w), a latent frame each."""

    column = "vace_reference_image"

    def __init__(self):
        super().__init__(output_params=("reference_latents",), onload_model_names=("vae",))

    def process(self, pipe, vace_reference_image, height, width, tiled, tile_size, tile_stride):
        images = image_list(vace_reference_image, "vace_reference_image")
        if not images:
            return {}
        videos = [[on_white(image, height, width)] for image in images]
        return {"reference_latents": torch.cat(encode_videos(pipe, videos, tiled, tile_size, tile_stride), dim=2)}


def on_white(image: Image.Image, height: int, width: int) -> Image.Image:
    """A whole image, as large as it fits, in the middle of a white one of `height` and `width` in pixels."""
    scale = min(height / image.height, width / image.width)
    size = int(image.width * scale), int(image.height * scale)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


class WanUnit_VaceContext(PipelineUnit):
    """Encodes the video to edit, its mask and the reference images to `vace_context` (1, 96, k + T, h, w)."""

    def __init__(self):
        super().__init__(output_params=("vace_context",), onload_model_names=("vae",))

    def process(
        self,
        pipe,
        vace_video,
        vace_video_mask,
        height,
        width,
        num_frames,
        tiled,
        tile_size,
        tile_stride,
        reference_latents=None,
    ):
        pipe.load_models_to_device(["vae"])
        size = {"height": height, "width": width, "num_frames": num_frames}
        video, mask = context_pixels(pipe, vace_video, vace_video_mask, **size)
        parts = [pipe.vae.encode(part, tiled, tile_size, tile_stride) for part in (video * (1 - mask), video * mask)]
        context = torch.cat([*parts, mask_channels(mask, pipe.latents.factor, parts[0].shape[2])], dim=1)
        if reference_latents is None:
            return {"vace_context": context}
        nothing = context.new_zeros(1, context.shape[1] - reference_latents.shape[1], *reference_latents.shape[2:])
        return {"vace_context": behind(torch.cat([reference_latents, nothing], dim=1), context)}


def context_pixels(
    pipe: "WanVACEPipeline",
    video: Frames | None,
    mask: Frames | None,
    height: int,
    width: int,
    num_frames: int,
) -> tuple[Tensor, Tensor]:
    """A video (1, 3, F, H, W) in [-1, 1], grey without one, and its mask (1, 1, F, H, W) in [0, 1], 1 to sample anew.

    Raises:
        ValueError: There is a mask without a video, or one of them has too few frames.
    """
    if video is None and mask is not None:
        raise ValueError("vace_video_mask is given without vace_video, of which it masks a part; give both.")
    size = height, width, num_frames
    pixels = torch.zeros((1, 3, num_frames, height, width), dtype=pipe.torch_dtype, device=pipe.device)
    if video is not None:
        frames = pipe.media.resized(image_list(video, "vace_video"), *size, name="vace_video")
        pixels = pipe.media.preprocess(frames, pipe.device, pipe.torch_dtype)
    if mask is None:
        return pixels, torch.ones_like(pixels[:, :1])
    grey = image_list([in_mode(frame, "L") for frame in mask], "vace_video_mask")
    frames = pipe.media.resized(grey, *size, name="vace_video_mask")
    return pixels, (pipe.media.preprocess(frames, pipe.device, pipe.torch_dtype)[:, :1] + 1) / 2


def mask_channels(mask: Tensor, factor: int, latent_frames: int) -> Tensor:
    """A mask (1, 1, F, H, W) as channels (1, 64, T, h, w): the 8 × 8 pixels of each latent pixel, row by row."""
    _, _, frames, height, width = mask.shape
    cells = mask.view(1, frames, height // factor, factor, width // factor, factor)
    channels = cells.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    return F.interpolate(channels.float(), (latent_frames, *channels.shape[3:]), mode="nearest-exact").to(mask)


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WanVACERequest(WanRequest):
    """Sample one video with VACE.

    Args:
        vace_video: Video that is edited or that controls; areas to paint anew should be grey in it.
        vace_video_mask: Video whose white area is sampled anew; None samples all of it anew, as `vace_video` controls.
        vace_reference_image: Image that the video shows, or several; each is fitted into a white frame.
        vace_scale: Factor of what VACE's blocks add; 0 samples from the prompt alone.
    """

    vace_video: Frames | None = None
    vace_video_mask: Frames | None = None
    vace_reference_image: Image.Image | Sequence[Image.Image] | None = None
    vace_scale: NonNegativeFloat = 1.0


class WanVACEPipeline(WanPipeline):
    """VACE on diffusers' transformer and Wan 2.1's autoencoder, and transformers' UMT5."""

    request = WanVACERequest
    components = WanPipeline.components | {
        "dit": Network("WanVACETransformer3DModel", lora=LORA_NAMES, layouts=[TRANSFORMER_LAYOUT])
    }
    model_fn = staticmethod(model_fn_wan_vace)
    unit_classes = (
        VideoShapeChecker,
        WanUnit_References,
        VideoNoiseInitializer,
        InputVideoEmbedder,
        VideoLossMask,
        WanUnit_VaceContext,
        WanUnit_PromptEmbedder,
    )

    def pixels_of(self, latents: Tensor, request: Mapping[str, Any]) -> Tensor:
        """Pixels (1, 3, F, H, W) in [-1, 1] of latents (1, 16, n + T, h, w), which begin with n references."""
        count = len(image_list(request["vace_reference_image"], "vace_reference_image"))
        return super().pixels_of(latents[:, :, count:], request)
