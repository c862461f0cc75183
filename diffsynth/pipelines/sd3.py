"""Stable Diffusion 3.5 (medium, large, large-turbo): text-to-image and image-to-image.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(https://arxiv.org/abs/2403.03206). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token. Two CLIPs and a T5 read the prompt;
one that is absent gives zeros, as in the training. Constants come from the released pipeline (diffusers'
StableDiffusion3Pipeline) unless a comment says otherwise. Skip-layer guidance is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.controlnet.inputs import InpaintControlEmbedder, InpaintControlRequest
from ..diffusion.flow_match import TRAINING_STEPS, linear_levels, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS
from ..diffusion.pipeline.vae import Latents
from .autoencoders.kl import SD3_STATISTICS, NormalisedAutoencoderKL
from .controlnets.sd3 import (
    CONTROL_FAMILY,
    SD3ControlNet,
    block_samples,
)
from .networks.sd3 import LORA_NAMES
from .prompts.sd3 import CLIP_TOKENS, ENCODERS, SD3Unit_PromptEmbedder
from .shared.positions import check_positions

__all__ = ["ModelConfig", "SD3Pipeline"]

SHIFT = 3.0
LAST_LINEAR = SHIFT / (TRAINING_STEPS + SHIFT - 1)  # the least noise level of the shifted training grid
MAX_PROMPT_TOKENS = 256  # of T5


def sd3_sigmas(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
    """Noise levels (N,) of Stable Diffusion 3: linear, then shifted by a constant factor of 3 at every resolution.

    The linear levels end at the least level of a grid that is shifted already, so that the last one is shifted twice.
    """
    return time_shift(linear_levels(num_inference_steps, denoising_strength, last=LAST_LINEAR), SHIFT)


def model_fn_sd3(
    dit: SD3Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    pooled_prompt_emb: Tensor,
    controlnets: Sequence[SD3ControlNet] = (),
    control_latents: Sequence[Tensor] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, 77 + L, D), CLIP's before T5's; padding is attended to, too.
        pooled_prompt_emb: Embeddings (B, P) of the whole prompt.
        control_latents: Latents (B, 16 or 17, h, w) of each image that a ControlNet reads.
    """
    for network in (dit, *controlnets):
        checkpoint_blocks(network, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    inputs = {
        "hidden_states": latents.to(dit.dtype),
        "timestep": timestep,
        "encoder_hidden_states": prompt_emb.to(dit.dtype),
        "pooled_projections": pooled_prompt_emb.to(dit.dtype),
    }
    samples = None
    if control_latents:
        samples = block_samples(controlnets, dit, inputs, control_latents, controlnet_scale)
    return dit(**inputs, block_controlnet_hidden_states=samples, return_dict=False)[0]


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SD3Request(InpaintControlRequest):
    """Sample one image with Stable Diffusion 3.5.

    Args:
        max_sequence_length: Tokens of T5 that the prompt is truncated or padded to; CLIP always reads 77.
    """

    num_inference_steps: SamplingSteps = 28
    cfg_scale: NonNegativeFloat = 3.5
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class SD3Pipeline(BasePipeline):
    """Stable Diffusion 3.5 on diffusers' transformer and VAE and transformers' CLIP-L, CLIP-bigG and T5-XXL."""

    request = SD3Request
    components = {
        "dit": Network("SD3Transformer2DModel", lora=LORA_NAMES),
        "text_encoder": Network("CLIPTextModelWithProjection", lora="text_encoder", optional=True),
        "text_encoder_2": Network("CLIPTextModelWithProjection", lora="text_encoder_2", optional=True),
        "text_encoder_3": Network("T5EncoderModel", lora="text_encoder_3", optional=True),
        "vae": Network(NormalisedAutoencoderKL),
        "tokenizer": Folder("CLIPTokenizer", needed_by="text_encoder"),
        "tokenizer_2": Folder("CLIPTokenizer", needed_by="text_encoder_2"),
        "tokenizer_3": Folder("T5TokenizerFast", needed_by="text_encoder_3"),
    }
    latents = Latents(channels=16, factor=8, patch=2, statistics=SD3_STATISTICS)
    control_family = CONTROL_FAMILY
    model_fn = staticmethod(model_fn_sd3)
    sigma_grid = staticmethod(sd3_sigmas)
    model_settings = ("max_sequence_length",)
    prompt_tokenizer = "tokenizer_3"
    text_widths = {"text_encoder_3": lambda dit, own: (dit.config.joint_attention_dim, own.config.d_model)}
    unit_classes = (
        *IMAGE_UNITS,
        InpaintControlEmbedder,
        SD3Unit_PromptEmbedder,
    )
    text_width, pooled_width = 4096, 2048  # D and P as released; those of `dit` once it is built

    def check_networks(self) -> None:
        super().check_networks()
        first, second = self.text_encoder, self.text_encoder_2
        widths = [encoder.config.projection_dim for encoder in (first, second) if encoder is not None]
        if sorted(widths) != widths:
            raise ValueError(
                f"text_encoder is {widths[0]} wide and text_encoder_2 {widths[1]}, but CLIP-L comes before the wider "
                "CLIP-bigG; exchange model.text_encoder and model.text_encoder_2."
            )
        if self.dit is None:
            return
        wanted = self.dit.config.pooled_projection_dim
        pooled = sum(widths) if len(widths) == 2 else max([wanted, *widths])
        if pooled != wanted:
            raise ValueError(
                f"dit takes pooled embeddings of width {wanted}, but the CLIPs make {pooled}: they are of different "
                "models; take the text encoders that were released with the transformer."
            )

    def build_models(self, model_configs: Iterable[ModelConfig] | Mapping[str, ModelConfig]) -> None:
        super().build_models(model_configs)
        if self.dit is not None:
            config = self.dit.config
            self.text_width, self.pooled_width = config.joint_attention_dim, config.pooled_projection_dim

    def require(self, users: Mapping[str, str]) -> None:
        """Refuse a pipeline without a model that is needed; of the text encoders one is enough."""
        absent = {name for name in ENCODERS if getattr(self, name) is None}
        spared = absent if len(absent) < len(ENCODERS) else set()
        super().require({name: user for name, user in users.items() if name not in spared})

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        for name in self.in_iteration_models:
            if (network := getattr(self, name)) is not None:
                check_positions(whole, name, self.latents.multiple * network.config.pos_embed_max_size)
        return whole

    def layer_names(self, name: str) -> LayerNames:
        names = super().layer_names(name)
        if name != "dit" or self.dit is None:
            return names
        # The text of the last block has only a shift and a scale, in the other order; other blocks have gates, too.
        last = f"joint_blocks.{self.dit.config.num_layers - 1}.context_block.adaLN_modulation.1"
        return replace(names, swapped=(*names.swapped, last))

    def prompt_limits(self) -> dict[str, int]:
        """T5's tokens, or without T5 the CLIPs' first: what a CLIP does not read, T5 does."""
        clips = [name for name in ("tokenizer", "tokenizer_2") if getattr(self, name) is not None]
        return super().prompt_limits() | dict.fromkeys(clips, CLIP_TOKENS)
