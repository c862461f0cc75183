"""Wan's image-to-video: Wan2.1-I2V, Wan2.1-FLF2V (first and last frame), Fun-InP; with its experts, Wan2.2-I2V.

The transformer reads 36 channels: 16 of noisy latents, 4 of a mask that is 1 where frames are given, and 16 of the
latents of a video that is grey but for the given frames. Wan 2.1 also attends to CLIP's features of these frames.
Constants are those of diffusers' WanImageToVideoPipeline. As there, CLIP sees the middle of an image that is resized by
its shorter side; DiffSynth-Studio squashes the whole image to a square.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import image_list
from ..diffusion.pipeline.units import PipelineUnit
from ..diffusion.pipeline.video_units import FirstFrameEmbedder, as_frame
from .layouts.wan import CLIP_LAYOUT
from .wan import MAX_PROMPT_TOKENS, WanPipeline, WanRequest

__all__ = ["ModelConfig", "WanImageToVideoPipeline"]


def model_fn_wan_image_to_video(
    dit: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    condition: Tensor,
    image_emb: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, T, h, w) of noisy latents (B, 16, T, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), zeros after the prompt's end.
        condition: Mask and latents of the given frames (B, 20, T, h, w).
        image_emb: CLIP's features (B, n, L, D) of the first frame, and of the last one if that is given.

    Raises:
        ValueError: The transformer attends to CLIP's features, and there are none, or not 512 tokens of text.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    return dit(
        hidden_states=torch.cat([latents, condition.to(latents)], dim=1).to(dit.dtype),
        timestep=timestep,
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        encoder_hidden_states_image=image_tokens(dit, image_emb, prompt_emb.shape[1]),
        return_dict=False,
    )[0]


def image_tokens(dit: WanTransformer3DModel, image_emb: Tensor | None, prompt_tokens: int) -> Tensor | None:
    """CLIP's features (B, n, L, D) in the shape that the transformer takes.

    With positions for two images it is (B n, L, D). Without them it is (B, L, D), and has only the first frame, as in
    DiffSynth-Studio.
    """
    if dit.config.image_dim is None:
        return None
    if image_emb is None:
        raise ValueError(
            "dit attends to CLIP's features of the first frame, and there are none; set model.image_encoder and "
            "model.image_processor to where they are."
        )
    check_prompt_tokens(dit, prompt_tokens)
    has_positions = dit.config.pos_embed_seq_len is not None
    return (image_emb.flatten(0, 1) if has_positions else image_emb[:, 0]).to(dit.dtype)


def check_prompt_tokens(dit: WanTransformer3DModel | None, count: int) -> None:
    """Refuse a length of prompts at which the transformer would take image features for text."""
    if dit is not None and dit.config.image_dim is not None and count != MAX_PROMPT_TOKENS:
        raise ValueError(
            f"max_sequence_length is {count}, expected {MAX_PROMPT_TOKENS}: dit takes that many of the last tokens for "
            "text, and those before them for CLIP's features."
        )


# Units ----------------------------------------------------------------------------------------------------------------


class WanUnit_ConditionEmbedder(PipelineUnit):
    """Encodes `input_image` and `end_image` to `condition` (1, 20, T, h, w): the mask, then the latents."""

    def __init__(self):
        super().__init__(output_params=("condition",), onload_model_names=("vae",))

    def process(self, pipe, input_image, end_image, height, width, num_frames, tiled, tile_size, tile_stride):
        if input_image is None:
            return self.without_image(pipe)
        pipe.load_models_to_device(["vae"])
        given = {"input_image": input_image, "end_image": end_image}
        frames = [as_frame(pipe, image, name, height, width) for name, image in given.items() if image is not None]
        latents = pipe.vae.encode(between_grey(pipe, frames, num_frames), tiled, tile_size, tile_stride)
        mask = torch.zeros_like(latents[:, :4])  # each channel is one of the four frames of a latent frame
        mask[:, :, 0] = 1
        if end_image is not None:
            mask[:, -1, -1] = 1
        return {"condition": torch.cat([mask, latents], dim=1)}

    def without_image(self, pipe: "WanImageToVideoPipeline") -> dict:
        """The outputs of a request without a first frame."""
        raise ValueError(
            f"{type(pipe).__name__} continues a first frame, but input_image is not given; give it, or take a model "
            "that generates from text alone, such as model=wan21_t2v_1_3b."
        )


def between_grey(pipe: "WanImageToVideoPipeline", frames: list[Image.Image], num_frames: int) -> Tensor:
    """A video (1, 3, F, H, W) in [-1, 1] that begins with the first of one or two frames and ends with the second.

    Raises:
        ValueError: It has fewer frames than are given.
    """
    if num_frames < len(frames):
        raise ValueError(
            f"num_frames is {num_frames}, but input_image and end_image are two frames; set num_frames=5 or more."
        )
    first, *last = (pipe.media.preprocess(frame, pipe.device, pipe.torch_dtype) for frame in frames)
    grey = first.new_zeros(1, 3, num_frames - len(frames), *first.shape[-2:])
    return torch.cat([first, grey, *last], dim=2)


class WanUnit_ImageFeatures(PipelineUnit):
    """Computes `image_emb` (1, n, L, D), CLIP's states before its last layer, of `input_image` and of `end_image`.

    Wan 2.2 and Fun-InP have no CLIP; their first frame is in the condition alone.
    """

    needs, reads_alone = "image_processor", False

    def __init__(self):
        super().__init__(output_params=("image_emb",), onload_model_names=("image_encoder",))

    def process(self, pipe, input_image, end_image):
        if input_image is None:
            return {}
        pipe.load_models_to_device(["image_encoder"])
        given = {"input_image": input_image, "end_image": end_image}
        images = [image for name, value in given.items() for image in image_list(value, name, pipe.media.mode)]
        pixels = torch.from_numpy(pipe.image_processor(images=images, return_tensors="np")["pixel_values"])
        states = pipe.image_encoder(pixels.to(pipe.device, pipe.torch_dtype), output_hidden_states=True).hidden_states
        return {"image_emb": states[-2].unsqueeze(0)}


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WanImageToVideoRequest(WanRequest):
    """Sample one video from its first frame.

    Args:
        end_image: Last frame of the video, resized to `height` and `width`.
    """

    takes_input_image: bool = True
    end_image: Image.Image | None = None


class WanImageToVideoPipeline(WanPipeline):
    """Wan's image-to-video on diffusers' transformer and autoencoder, and transformers' UMT5 and CLIP."""

    request = WanImageToVideoRequest
    components = WanPipeline.components | {
        "image_encoder": Network("CLIPVisionModel", optional=True, layouts=[CLIP_LAYOUT]),
        "image_processor": Folder("CLIPImageProcessorPil"),
    }
    model_fn = staticmethod(model_fn_wan_image_to_video)
    unit_classes = (
        *(unit for unit in WanPipeline.unit_classes if unit is not FirstFrameEmbedder),
        WanUnit_ConditionEmbedder,
        WanUnit_ImageFeatures,
    )
    dit_channels = (36,)
    needed_columns: ClassVar[Collection[str]] = ("input_image",)  # columns that every training reads

    def check_networks(self) -> None:
        super().check_networks()
        if self.dit is None or self.image_encoder is None:
            return
        found, wanted = self.image_encoder.config.hidden_size, self.dit.config.image_dim
        if wanted is None:
            raise ValueError(
                "dit reads no features of images; set model.image_encoder=null and model.image_processor=null."
            )
        if found != wanted:
            raise ValueError(f"image_encoder has width {found}, but dit reads features of width {wanted}.")

    def complete(self, request: Mapping[str, Any]) -> dict:
        whole = super().complete(request)
        check_prompt_tokens(self.dit, whole["max_sequence_length"])
        if whole["input_image"] is not None and whole["end_image"] is None and self.needs_end_image:
            raise ValueError("dit was trained with a first and a last frame, but end_image is not given; give it too.")
        return whole

    def check_columns(self, columns: Collection[str]) -> None:
        super().check_columns(columns)
        check_prompt_tokens(self.dit, self.call_defaults["max_sequence_length"])
        needed = [*self.needed_columns, *["end_image"] * self.needs_end_image]
        if absent := [column for column in needed if column not in columns]:
            raise ValueError(
                f"{type(self).__name__} cannot be trained without {absent[0]}; set task.extra_inputs="
                f"[{','.join(needed)}]. Frames are those of the video in rows that have no such column."
            )

    @property
    def needs_end_image(self) -> bool:
        """Whether the transformer has positions for CLIP's features of two images, and thus needs both."""
        return self.dit is not None and self.dit.config.pos_embed_seq_len is not None
