"""Wan-Fun-Control: video from a text and a control video (edges, depth, poses), and optionally from its first frame.

Alibaba PAI 2025, "Wan2.1-Fun" (https://github.com/aigc-apps/VideoX-Fun). The transformer reads 48 channels: 16 of noisy
latents, 16 of the control video's latents, and 16 of the given frames' latents; with 52, their mask comes before the
last 16. Networks with a layer for a reference image (`ref_conv`, V1.1) or for a camera (`control_adapter`) are refused:
diffusers has no class for them. Constants are those of DiffSynth-Studio.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ..core.loader import ModelConfig
from ..diffusion.pipeline.image_units import image_list
from ..diffusion.pipeline.request import Frames
from ..diffusion.pipeline.units import PipelineUnit
from ..diffusion.pipeline.video_units import encode_videos
from .wan_image_to_video import (
    WanImageToVideoPipeline,
    WanImageToVideoRequest,
    WanUnit_ConditionEmbedder,
    model_fn_wan_image_to_video,
)

__all__ = ["ModelConfig", "WanFunControlPipeline"]


def model_fn_wan_fun_control(
    dit: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    control_latents: Tensor,
    condition: Tensor | None = None,
    image_emb: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, T, h, w) of noisy latents (B, 16, T, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), zeros after the prompt's end.
        control_latents: Latents (B, 16, T, h, w) of the control video.
        condition: Mask and latents of the given frames (B, 20, T, h, w); None is 0 everywhere.
        image_emb: CLIP's features (B, n, L, D) of the first frame; None is 0 everywhere.
    """
    batch, channels, *size = latents.shape
    if condition is None:
        condition = latents.new_zeros(batch, 20, *size)
    if image_emb is None and dit.config.image_dim is not None:
        # DiffSynth-Studio has 257 tokens of zeros; attention to one of them is the same.
        image_emb = prompt_emb.new_zeros(batch, 1, 1, dit.config.image_dim)
    others = dit.config.in_channels - channels - control_latents.shape[1]
    condition = torch.cat([control_latents, condition[:, -others:].to(control_latents)], dim=1)
    checkpointing = use_gradient_checkpointing, use_gradient_checkpointing_offload
    return model_fn_wan_image_to_video(dit, latents, timestep, prompt_emb, condition, image_emb, *checkpointing)


class WanUnit_ControlEmbedder(PipelineUnit):
    """Encodes `control_video` to `control_latents` (1, 16, T, h, w)."""

    def __init__(self):
        super().__init__(output_params=("control_latents",), onload_model_names=("vae",))

    def process(self, pipe, control_video, height, width, num_frames, tiled, tile_size, tile_stride):
        if control_video is None:
            raise ValueError(f"{type(pipe).__name__} needs control_video, which is not given; give its frames.")
        control_video = image_list(control_video, "control_video")
        frames = pipe.media.resized(control_video, height, width, num_frames, name="control_video")
        return {"control_latents": encode_videos(pipe, [frames], tiled, tile_size, tile_stride)[0]}


class WanUnit_OptionalConditionEmbedder(WanUnit_ConditionEmbedder):
    """Encodes `input_image` and `end_image`, if they are given, to `condition` (1, 20, T, h, w)."""

    def without_image(self, pipe: "WanFunControlPipeline") -> dict:
        return {}


@dataclass(kw_only=True)
class WanFunControlRequest(WanImageToVideoRequest):
    """Sample one video that a control video leads.

    Args:
        control_video: Frames of edges, depth or poses, at least `num_frames`, resized to `height` and `width`.
    """

    control_video: Frames | None = None


class WanFunControlPipeline(WanImageToVideoPipeline):
    """Wan-Fun-Control on the classes of Wan's image-to-video."""

    request = WanFunControlRequest
    model_fn = staticmethod(model_fn_wan_fun_control)
    unit_classes = (
        *(
            WanUnit_OptionalConditionEmbedder if unit is WanUnit_ConditionEmbedder else unit
            for unit in WanImageToVideoPipeline.unit_classes
        ),
        WanUnit_ControlEmbedder,
    )
    dit_channels = (48, 52)
    needed_columns: ClassVar[Collection[str]] = ("control_video",)
