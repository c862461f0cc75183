"""Wan 2.1 and Wan 2.2: text-to-video, and video from a text and its first frame (Wan2.2-TI2V-5B).

Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models" (https://arxiv.org/abs/2503.20314).
Networks: diffusers, transformers. Latents are (B, 16, T, H/8, W/8) with T = (F - 1) / 4 + 1 of F frames, those of
TI2V-5B (B, 48, T, H/16, W/16). The transformer reads 1 × 2 × 2 latent pixels as a token. Constants are those of the
released pipelines (diffusers' WanPipeline) and of DiffSynth-Studio unless a comment says otherwise.
"""

import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import ftfy
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, SamplingSteps, Side, Tokens
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import TRAINING_STEPS, per_sample, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.request import VideoRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.pipeline.video_media import VideoMedia
from ..diffusion.pipeline.video_units import (
    FirstFrameEmbedder,
    InputVideoEmbedder,
    VideoLossMask,
    VideoNoiseInitializer,
    VideoShapeChecker,
)
from ..diffusion.prompts.embedder import PromptEmbedder
from .autoencoders.wan import WanVAE
from .layouts.wan import LORA_NAMES, TRANSFORMER_LAYOUT, UMT5_LAYOUT, VAE_LAYOUT
from .networks.wan import use_splittable_attention

__all__ = ["ModelConfig", "Wan22TI2VPipeline", "WanPipeline"]

SIGMA_SHIFT = 5.0
MAX_PROMPT_TOKENS = 512
TEXT_ALONE = "model.takes_input_image is false: the model generates from text alone; "
# Models by the numbers of channels that their transformers read and predict.
MODELS = {(16, 16): "wan21_t2v_1_3b", (36, 16): "wan21_i2v_14b_480p", (48, 48): "wan22_ti2v_5b"}


def wan_sigmas(num_inference_steps: int, denoising_strength: float = 1.0, sigma_shift: float = SIGMA_SHIFT) -> Tensor:
    """Noise levels (N,) of Wan: linear, then shifted towards noise by k = `sigma_shift` (`time_shift`)."""
    return time_shift(torch.linspace(denoising_strength, 0, num_inference_steps + 1)[:-1], sigma_shift)


def model_fn_wan(
    dit: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    given_latents: Tensor | None = None,
    is_given: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, C, T, h, w) of noisy latents (B, C, T, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), zeros after the prompt's end.
        given_latents: Clean latents (B, C, t, h, w) of the first t latent frames. They take the place of the noisy
            ones, at timestep 0; the velocity of these frames leads to them.
        is_given: Samples (B,), bool, whose `given_latents` are read, in training: the velocity of their first frames is
            the network's, and is not learned. None reads all.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    seen, time = latents, timestep
    if given_latents is not None:
        seen, time = with_given_frames(latents, timestep, given_latents, is_given)
    velocity = dit(
        hidden_states=seen.to(dit.dtype),
        timestep=time,
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        return_dict=False,
    )[0]
    if given_latents is None or is_given is not None:
        return velocity
    return towards_given_frames(velocity, latents, timestep, given_latents)


def with_given_frames(
    latents: Tensor, timestep: Tensor, given: Tensor, is_given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, T, h, w) whose first frames are the given ones, and the timestep (B, tokens) of each token."""
    count = given.shape[2]
    _, _, frames, height, width = latents.shape
    tokens = (height // 2) * (width // 2)
    by_frame = timestep.unsqueeze(1).repeat(1, frames)
    first, given = latents[:, :, :count], given.to(latents)
    if is_given is None:
        by_frame[:, :count] = 0
    else:
        by_frame[:, :count] *= ~is_given.unsqueeze(1)
        given = torch.where(per_sample(is_given, first), given, first)
    return torch.cat([given, latents[:, :, count:]], dim=2), by_frame.repeat_interleave(tokens, dim=1)


def towards_given_frames(velocity: Tensor, latents: Tensor, timestep: Tensor, given: Tensor) -> Tensor:
    """The velocity (B, C, T, h, w), in the first frames replaced by (x_σ - x₀) / σ, which leads to the given ones."""
    count = given.shape[2]
    sigma = per_sample(timestep / TRAINING_STEPS, latents).to(latents)
    return torch.cat([((latents[:, :, :count] - given) / sigma).to(velocity), velocity[:, :, count:]], dim=2)


# Units ----------------------------------------------------------------------------------------------------------------


class WanUnit_PromptEmbedder(PromptEmbedder):
    """Computes UMT5's embeddings (1, L, D) of a prompt; those after its end are zeros, which are attended to."""

    def tokenize(self, pipe, prompt, max_sequence_length):
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return dict(pipe.tokenizer([cleaned(prompt)], max_length=max_sequence_length, **options))

    def embed(self, pipe: "WanPipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return pipe.text_encoder(**tokens).last_hidden_state * tokens["attention_mask"].unsqueeze(-1)


def cleaned(prompt: str) -> str:
    """A prompt with its broken characters mended, HTML's names replaced by their characters, and single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WanRequest(VideoRequest):
    """Sample one video with Wan.

    Args:
        input_image: First frame of the video, resized to `height` and `width`.
        takes_input_image: Whether the model was trained to continue a first frame; otherwise `input_image` is refused.
        sigma_shift: Shift k of the noise levels towards noise.
        max_sequence_length: Tokens that a prompt is padded or cut to.
    """

    height: Side = 480
    width: Side = 832
    num_inference_steps: SamplingSteps = 50
    cfg_scale: NonNegativeFloat = 5.0
    tile_size: PositiveInt = 32
    tile_stride: PositiveInt = 24
    input_image: Image.Image | None = None
    takes_input_image: bool = False
    sigma_shift: PositiveFloat = SIGMA_SHIFT
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class WanPipeline(BasePipeline):
    """Wan's text-to-video on diffusers' transformer and autoencoder, and transformers' UMT5."""

    request = WanRequest
    components = {
        "dit": Network(
            "WanTransformer3DModel", after=use_splittable_attention, lora=LORA_NAMES, layouts=[TRANSFORMER_LAYOUT]
        ),
        "text_encoder": Network("UMT5EncoderModel", lora="text_encoder", layouts=[UMT5_LAYOUT]),
        "vae": Network(WanVAE, layouts=[VAE_LAYOUT]),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
    }
    latents = Latents(channels=16, factor=8, patch=2, time_factor=4)
    media = VideoMedia()
    model_fn = staticmethod(model_fn_wan)
    sigma_grid = staticmethod(wan_sigmas)
    model_settings = ("num_frames", "frame_rate", "takes_input_image", "sigma_shift", "max_sequence_length")
    unit_classes = (
        VideoShapeChecker,
        VideoNoiseInitializer,
        InputVideoEmbedder,
        VideoLossMask,
        FirstFrameEmbedder,
        WanUnit_PromptEmbedder,
    )
    dit_channels: ClassVar[Sequence[int]] = (16,)  # numbers of channels that the transformer may read

    text_widths = {"text_encoder": lambda dit, own: (dit.config.text_dim, own.config.d_model)}

    def check_networks(self) -> None:
        super().check_networks()
        check_channels(self)

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        if whole["input_image"] is not None and not whole["takes_input_image"]:
            raise ValueError(f"input_image is given, but {TEXT_ALONE}leave it out, or take model=wan22_ti2v_5b.")
        return whole

    def check_columns(self, columns: Collection[str]) -> None:
        super().check_columns(columns)
        if "input_image" in columns and not self.call_defaults["takes_input_image"]:
            raise ValueError(
                f"task.extra_inputs names input_image, but {TEXT_ALONE}set task.extra_inputs=[], or take "
                "model=wan22_ti2v_5b."
            )

    def prompt_text(self, prompt: str) -> str:
        return cleaned(prompt)


class Wan22TI2VPipeline(WanPipeline):
    """Wan2.2-TI2V-5B, whose autoencoder has 48 channels and 16 × 16 pixels a latent pixel."""

    latents = Latents(channels=48, factor=16, patch=2, time_factor=4)
    dit_channels = (48,)


def check_channels(pipe: WanPipeline) -> None:
    """Refuse a transformer whose channels are those of another model of Wan's."""
    own = pipe.latents.channels
    for name in pipe.in_iteration_models:
        network = getattr(pipe, name)
        found = network and (network.config.in_channels, network.config.out_channels)
        if found not in [None, *((channels, own) for channels in pipe.dit_channels)]:
            other = f"; take model={MODELS[found]}" if found in MODELS else ""
            wanted = " or ".join(map(str, pipe.dit_channels))
            counts = f"reads {found[0]} channels and predicts {found[1]}"
            raise ValueError(f"{name} {counts}, expected {wanted} and {own}{other}.")
