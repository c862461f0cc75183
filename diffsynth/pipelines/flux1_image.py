"""FLUX.1 (dev, schnell, Kontext): text-to-image and image-to-image, editing one or several images.

Black Forest Labs 2025, "FLUX.1 Kontext" (https://arxiv.org/abs/2506.15742). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token, (B, H/16 · W/16, 64). Edit images
are further image tokens. T5 embeds each word of a prompt, CLIP the prompt as a whole. Constants come from the
released pipelines (diffusers' FluxPipeline, FluxKontextPipeline) unless a comment says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.controlnet.inputs import ControlEmbedder
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS, EditImageEmbedder
from ..diffusion.pipeline.kv_cache import KVCache
from ..diffusion.pipeline.request import EDIT_IMAGE_PIXELS, EditRequest, TemplateRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.template.cache import append_text
from ..diffusion.template.lora import InputLoRA, added
from .autoencoders.kl import FLUX1_STATISTICS, NormalisedAutoencoderKL
from .controlnets.flux1 import (
    CONTROL_FAMILY,
    Flux1ControlNet,
    Flux1ControlRequest,
    Flux1Unit_ControlMode,
    block_samples,
)
from .networks.flux1 import (
    CLIP_LORA_NAMES,
    LORA_NAMES,
    image_inputs,
    prompt_inputs,
)
from .prompts.flux1 import Flux1Unit_PooledPromptEmbedder, Flux1Unit_PromptEmbedder
from .shared.flux1 import flux1_sigmas, use_joint_attention
from .shared.tokens import unpack_latents

__all__ = ["Flux1ImagePipeline", "ModelConfig"]

MAX_PROMPT_TOKENS = 512


def model_fn_flux1(
    dit: FluxTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    pooled_prompt_emb: Tensor,
    edit_latents: Sequence[Tensor] = (),
    fill_latents: Tensor | None = None,
    controlnets: Sequence[Flux1ControlNet] = (),
    control_latents: Sequence[Tensor] = (),
    control_modes: Sequence[Tensor] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
    control_prompt: tuple[Tensor, Tensor] | None = None,
    embedded_guidance: float | Sequence[float] = 1.0,
    kv_cache: KVCache | None = None,
    lora: InputLoRA | None = None,
    extra_text_embedding: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: T5's embeddings (B, L, D); the network was trained to attend to padding, too.
        pooled_prompt_emb: CLIP's embeddings (B, D') of whole prompts.
        edit_latents: Clean latents (B, 16, h', w') of each edit image, of their own sizes.
        fill_latents: What Fill reads beside the noisy latents, (B, 80, h, w): the kept area's latents, and the mask.
        control_latents: Latents (B, 16, h, w) of each image that a ControlNet reads.
        control_modes: Modes (B,) of each of these images.
        control_prompt: `prompt_emb` and `pooled_prompt_emb` of the ControlNets, if they read another prompt.
        embedded_guidance: Guidance scale, one or B, an input of dev, Kontext and Fill; schnell ignores it.
        kv_cache: Extra keys and values by block, `double_0`, `single_0` and so on.
        lora: Updates of the transformer's layers.
        extra_text_embedding: Text embeddings (B, L', D) appended to the prompt's.
    """
    for network in (dit, *controlnets):
        checkpoint_blocks(network, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    noisy = latents if fill_latents is None else torch.cat([latents, fill_latents], dim=1)
    guidance = sent(torch.as_tensor(embedded_guidance), latents.device).expand(len(latents))
    text, _ = append_text(prompt_emb, None, extra_text_embedding)
    inputs = {"timestep": timestep / 1000, "guidance": guidance, **prompt_inputs(dit, text, pooled_prompt_emb)}
    images, samples = image_inputs(dit, [noisy, *edit_latents]), {}
    if control_latents:
        own = {**inputs, **image_inputs(dit, [latents])}
        edit_tokens = images["hidden_states"].shape[1] - own["hidden_states"].shape[1]
        samples = block_samples(
            controlnets, dit, own, control_latents, control_modes, control_prompt, controlnet_scale, edit_tokens
        )
    if not dit.config.guidance_embeds:
        inputs["guidance"] = None
    attention = {"kv_cache": kv_cache} if kv_cache else None
    with added(dit, lora):
        velocity = dit(**inputs, **images, **samples, joint_attention_kwargs=attention, return_dict=False)[0]
    return unpack_latents(velocity, *latents.shape[2:])


# Units ----------------------------------------------------------------------------------------------------------------


class Flux1Unit_EditImageEmbedder(EditImageEmbedder):
    @staticmethod
    def resize(image: Image.Image, pixels: int) -> Image.Image:
        """Scale an image to about `pixels` pixels, in the nearest of the proportions that Kontext was trained at."""
        proportions = image.width / image.height
        sides = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(proportions - size[0] / size[1]))
        scale = math.sqrt(pixels / EDIT_IMAGE_PIXELS)
        width, height = (max(1, round(side * scale / 16)) * 16 for side in sides)
        return image.resize((width, height), Image.Resampling.LANCZOS)


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Flux1Request(EditRequest, TemplateRequest, Flux1ControlRequest):
    """Sample one image with FLUX.1; only Kontext was trained to read `edit_image`.

    Args:
        embedded_guidance: Guidance scale that dev, Kontext and Fill read as an input; schnell ignores it.
        exponential_shift_mu: Shift of the noise levels, 0 for none; None computes it from the number of tokens.
        max_sequence_length: Tokens that T5 truncates or pads a prompt to.
    """

    num_inference_steps: SamplingSteps = 28
    embedded_guidance: NonNegativeFloat = 3.5
    exponential_shift_mu: float | None = None
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class Flux1ImagePipeline(BasePipeline):
    """FLUX.1 on diffusers' transformer and VAE and transformers' CLIP and T5."""

    token_channels: ClassVar[int] = 64  # that the transformer reads

    request = Flux1Request
    components = {
        "dit": Network("FluxTransformer2DModel", after=use_joint_attention, lora=LORA_NAMES),
        "text_encoder": Network("CLIPTextModel", lora=CLIP_LORA_NAMES),
        "text_encoder_2": Network("T5EncoderModel", lora="text_encoder_2"),
        "vae": Network(NormalisedAutoencoderKL),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
        "tokenizer_2": Folder("AutoTokenizer", needed_by="text_encoder_2"),
    }
    latents = Latents(channels=16, factor=8, patch=2, statistics=FLUX1_STATISTICS)
    control_family = CONTROL_FAMILY
    model_fn = staticmethod(model_fn_flux1)
    sigma_grid = staticmethod(flux1_sigmas)
    model_settings = ("embedded_guidance", "exponential_shift_mu", "max_sequence_length", "edit_image_pixels")
    prompt_tokenizer = "tokenizer_2"  # T5's; CLIP reads the first 77 tokens of every prompt
    text_widths = {
        "text_encoder": lambda dit, own: (dit.config.pooled_projection_dim, own.config.hidden_size),
        "text_encoder_2": lambda dit, own: (dit.config.joint_attention_dim, own.config.d_model),
    }
    unit_classes = (
        *IMAGE_UNITS,
        Flux1Unit_EditImageEmbedder,
        Flux1Unit_ControlMode,  # before the next one, so that a wrong mode is refused before an encoder runs
        ControlEmbedder,
        Flux1Unit_PromptEmbedder,
        Flux1Unit_PooledPromptEmbedder,
    )

    def prompt_limits(self) -> dict[str, int]:
        clip = self.text_encoder and self.tokenizer
        own = {"tokenizer": self.text_encoder.config.max_position_embeddings} if clip else {}
        return super().prompt_limits() | own

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        own, given = self.call_defaults["embedded_guidance"], whole["embedded_guidance"]
        if self.dit is not None and not self.dit.config.guidance_embeds and given != own:
            raise ValueError(
                f"embedded_guidance is {given}, but dit has no guidance embedding, as schnell has none, and would "
                "ignore it; leave it out."
            )
        return whole

    def check_networks(self) -> None:
        super().check_networks()
        if self.dit is None:
            return
        config = self.dit.config
        if config.in_channels != self.token_channels:
            raise ValueError(
                f"dit reads {config.in_channels} channels a token, expected {self.token_channels}: take "
                "model=flux1_fill for FLUX.1 Fill (384), another model=flux1_… for the others (64)."
            )
