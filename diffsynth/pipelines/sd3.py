"""Stable Diffusion 3.5 (medium, large, large-turbo): text-to-image and image-to-image.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(https://arxiv.org/abs/2403.03206). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token. Two CLIPs and a T5 read the prompt;
one that is absent gives zeros, as in the training. Constants come from the released pipeline (diffusers'
StableDiffusion3Pipeline) unless a comment says otherwise. Skip-layer guidance is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
from ..diffusion.pipeline.units import PipelineUnit
from ..diffusion.pipeline.vae import Latents
from .autoencoders.kl import SD3_STATISTICS, NormalisedAutoencoderKL
from .controlnets.sd3 import (
    CONTROL_FAMILY,
    SD3ControlNet,
    block_samples,
)

__all__ = ["ModelConfig", "SD3Pipeline"]

SHIFT = 3.0
LAST_LINEAR = SHIFT / (TRAINING_STEPS + SHIFT - 1)  # the least noise level of the shifted training grid
CLIP_TOKENS = 77  # positions that both CLIPs have; prompts are padded to it
MAX_PROMPT_TOKENS = 256  # of T5
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
BLOCK = "transformer_blocks.*"
# Stability AI's names of the layers; in the swapped ones they have the shift before the scale.
LORA_NAMES = LayerNames(
    prefix="transformer",
    original={
        "joint_blocks.*.x_block.attn.qkv": tuple(f"{BLOCK}.attn.to_{part}" for part in "qkv"),
        "joint_blocks.*.context_block.attn.qkv": tuple(f"{BLOCK}.attn.add_{part}_proj" for part in "qkv"),
        "joint_blocks.*.x_block.attn2.qkv": tuple(f"{BLOCK}.attn2.to_{part}" for part in "qkv"),
        "joint_blocks.*.x_block.attn2.proj": f"{BLOCK}.attn2.to_out.0",
        "joint_blocks.*.x_block.attn.proj": f"{BLOCK}.attn.to_out.0",
        "joint_blocks.*.context_block.attn.proj": f"{BLOCK}.attn.to_add_out",
        "joint_blocks.*.x_block.mlp.fc1": f"{BLOCK}.ff.net.0.proj",
        "joint_blocks.*.x_block.mlp.fc2": f"{BLOCK}.ff.net.2",
        "joint_blocks.*.context_block.mlp.fc1": f"{BLOCK}.ff_context.net.0.proj",
        "joint_blocks.*.context_block.mlp.fc2": f"{BLOCK}.ff_context.net.2",
        "joint_blocks.*.x_block.adaLN_modulation.1": f"{BLOCK}.norm1.linear",
        "joint_blocks.*.context_block.adaLN_modulation.1": f"{BLOCK}.norm1_context.linear",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
)


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


# Units ----------------------------------------------------------------------------------------------------------------


class SD3Unit_PromptEmbedder(PipelineUnit):
    """Computes text embeddings (1, 77 + L, D) of a prompt by two CLIPs and a T5, and CLIP's pooled ones (1, P)."""

    def __init__(self):
        super().__init__(
            separate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_emb", "pooled_prompt_emb"),
            onload_model_names=ENCODERS,
        )

    def process(self, pipe, prompt, max_sequence_length):
        return self.process_batch(pipe, [{"prompt": prompt, "max_sequence_length": max_sequence_length}])[0]

    def process_batch(self, pipe: "SD3Pipeline", batch: Sequence[Mapping]) -> list[dict]:
        """Embed all prompts together: they are padded to one length, with or without others."""
        pipe.load_models_to_device(ENCODERS)
        prompts = [inputs["prompt"] for inputs in batch]
        clip, pooled = pipe.clip_embeddings(prompts)
        embeddings = torch.cat([clip, pipe.t5_embeddings(prompts, batch[0]["max_sequence_length"])], dim=1)
        pairs = zip(embeddings.split(1), pooled.split(1), strict=True)
        return [{"prompt_emb": own, "pooled_prompt_emb": whole} for own, whole in pairs]


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
        networks = {name: getattr(self, name) for name in self.in_iteration_models}
        for name, network in networks.items():
            last = math.inf if network is None else self.latents.multiple * network.config.pos_embed_max_size
            if max(whole["height"], whole["width"]) > last:
                raise ValueError(
                    f"height x width is {whole['height']} x {whole['width']}, but the positions of {name} end at "
                    f"{last} pixels; set smaller ones."
                )
        return whole

    def layer_names(self, name: str) -> LayerNames:
        names = super().layer_names(name)
        if name != "dit" or self.dit is None:
            return names
        # The text of the last block has only a shift and a scale, in the other order; other blocks have gates, too.
        last = f"joint_blocks.{self.dit.config.num_layers - 1}.context_block.adaLN_modulation.1"
        return replace(names, swapped=(*names.swapped, last))

    def clip_embeddings(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP's states (B, 77, D) before the last layer, and pooled embeddings (B, P), of B prompts.

        CLIP-L's are the first channels and bigG's the next; those of an absent one, and the rest, are 0.
        """
        options = {"dtype": self.torch_dtype, "device": self.device}
        states = torch.zeros(len(prompts), CLIP_TOKENS, self.text_width, **options)
        pooled = torch.zeros(len(prompts), self.pooled_width, **options)
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(self, name)) is None:
                continue
            found = encoder(input_ids=self.token_ids(name, prompts, CLIP_TOKENS), output_hidden_states=True)
            width = found.text_embeds.shape[-1]
            before = 0 if name == "text_encoder" else self.pooled_width - width
            states = states + F.pad(found.hidden_states[-2], (before, self.text_width - before - width))
            pooled = pooled + F.pad(found.text_embeds, (before, self.pooled_width - before - width))
        return states, pooled

    def t5_embeddings(self, prompts: Sequence[str], length: int) -> Tensor:
        """T5's last states (B, length, D) of B prompts; padding is attended to, and without T5 they are 0."""
        if self.text_encoder_3 is None:
            return torch.zeros(len(prompts), length, self.text_width, dtype=self.torch_dtype, device=self.device)
        return self.text_encoder_3(self.token_ids("text_encoder_3", prompts, length)).last_hidden_state

    def token_ids(self, encoder: str, prompts: Sequence[str], length: int) -> Tensor:
        """Token ids (B, length) of B prompts, truncated or padded, for a text encoder."""
        tokenizer = getattr(self, ENCODERS[encoder])
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(prompts, max_length=length, **options).input_ids.to(self.device)

    def prompt_limits(self) -> dict[str, int]:
        """T5's tokens, or without T5 the CLIPs' first: what a CLIP does not read, T5 does."""
        clips = [name for name in ("tokenizer", "tokenizer_2") if getattr(self, name) is not None]
        return super().prompt_limits() | dict.fromkeys(clips, CLIP_TOKENS)
