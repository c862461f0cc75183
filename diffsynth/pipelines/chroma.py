"""Chroma: text-to-image and image-to-image.

Lodestone Rock 2025, "Chroma1-HD" (https://huggingface.co/lodestones/Chroma1-HD). Networks: diffusers, transformers.
It is FLUX.1 without CLIP, guidance embedding and the layers of each block that modulate it: one small network computes
their outputs. Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token, and of the prompt
T5's embeddings of its tokens and of one token of padding. Constants come from diffusers' ChromaPipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS
from ..diffusion.pipeline.request import ImageRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from .autoencoders.kl import FLUX1_STATISTICS, NormalisedAutoencoderKL
from .shared.flux1 import (
    BLOCK_NAMES,
    Flux1AttnProcessor,
    flux1_sigmas,
    image_positions,
    use_joint_attention,
)
from .shared.tokens import pack_latents, unpack_latents

__all__ = ["ChromaPipeline", "ModelConfig"]

MAX_PROMPT_TOKENS = 512
PADDING = 0  # T5's id of padding
LORA_NAMES = LayerNames(prefix="transformer", original=BLOCK_NAMES)


# The network ----------------------------------------------------------------------------------------------------------


class ChromaAttnProcessor(Flux1AttnProcessor):
    """Attention of image and text tokens to the tokens that the mask names.

    In diffusers' mask (B, 1, S, S), padding rows are all False, and softmax over an empty row is NaN.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mask = None if attention_mask is None else attention_mask[:, 0, -1]  # the row of an image token
        return self.joint(attn, hidden_states, encoder_hidden_states, image_rotary_emb, mask)


def prepare(dit: ChromaTransformer2DModel) -> None:
    """Set the attention processors, and make the input of Chroma's unused guidance where the network is."""
    use_joint_attention(dit, ChromaAttnProcessor)
    embedder = dit.time_text_embed

    def zeros(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.zeros(args[0].shape, device=embedder.mod_proj.device),)

    embedder.guidance_proj.register_forward_pre_hook(zeros)  # diffusers makes it on the CPU, which waits for the GPU


def model_fn_chroma(
    dit: ChromaTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_mask: Tensor | None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: T5's embeddings (B, L, D), right-padded.
        prompt_emb_mask: False where `prompt_emb` is padding (B, L); None if nothing is.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    tokens = pack_latents(latents).to(dit.dtype)
    mask = None if prompt_emb_mask is None else F.pad(prompt_emb_mask, (0, tokens.shape[1]), value=True)
    give_mask_to_checkpointed(dit, mask)
    velocity = dit(
        hidden_states=tokens,
        timestep=timestep / 1000,
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        img_ids=image_positions([latents]),
        txt_ids=torch.zeros(prompt_emb.shape[1], 3, device=latents.device),
        attention_mask=mask,
        return_dict=False,
    )[0]
    return unpack_latents(velocity, *latents.shape[2:])


def give_mask_to_checkpointed(dit: ChromaTransformer2DModel, mask: Tensor | None) -> None:
    """Pass the mask to single blocks under gradient checkpointing, too; diffusers passes it to double blocks only."""
    checkpoint = dit._gradient_checkpointing_func

    def run(block: nn.Module, *args) -> Tensor | tuple[Tensor, Tensor]:
        return (
            checkpoint(block, *args, mask)
            if isinstance(block, ChromaSingleTransformerBlock)
            else checkpoint(block, *args)
        )

    dit._gradient_checkpointing_func = run


# Pipeline -------------------------------------------------------------------------------------------------------------


class ChromaUnit_PromptEmbedder(PromptEmbedder):
    """Computes T5's embeddings (1, L, D) of a prompt's tokens and of one token of padding, and their mask (1, L).

    The network was trained to attend to that one, and to no further padding.
    """

    def __init__(self):
        super().__init__(masked=True)

    def tokenize(self, pipe, prompt, max_sequence_length) -> dict[str, Tensor]:
        tokens = pipe.tokenizer([prompt], max_length=max_sequence_length, truncation=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        padding = 0, min(1, max_sequence_length - ids.shape[1])
        return {"input_ids": F.pad(ids, padding, value=PADDING), "attention_mask": F.pad(mask, padding)}

    def embed(self, pipe: "ChromaPipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return pipe.text_encoder(**tokens).last_hidden_state


@dataclass(kw_only=True)
class ChromaRequest(ImageRequest):
    """Sample one image with Chroma.

    Args:
        max_sequence_length: Tokens that a prompt is truncated to.
    """

    num_inference_steps: SamplingSteps = 35
    cfg_scale: NonNegativeFloat = 5.0
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class ChromaPipeline(BasePipeline):
    """Chroma on diffusers' transformer and VAE and transformers' T5."""

    request = ChromaRequest
    components = {
        "dit": Network("ChromaTransformer2DModel", after=prepare, lora=LORA_NAMES),
        "text_encoder": Network("T5EncoderModel", lora="text_encoder"),
        "vae": Network(NormalisedAutoencoderKL),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
    }
    latents = Latents(channels=16, factor=8, patch=2, statistics=FLUX1_STATISTICS)
    model_fn = staticmethod(model_fn_chroma)
    sigma_grid = staticmethod(flux1_sigmas)
    model_settings = ("max_sequence_length",)
    text_widths = {"text_encoder": lambda dit, own: (dit.config.joint_attention_dim, own.config.d_model)}
    unit_classes = (
        *IMAGE_UNITS,
        ChromaUnit_PromptEmbedder,
    )
