"""AuraFlow, a family that only the tests have: docs/pipelines.md builds it step by step.

Networks: diffusers and transformers. Latents are (B, 4, H/8, W/8), which the transformer sees in patches of 2 × 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
from torch import Tensor

from diffsynth.core.gradient import checkpoint_blocks
from diffsynth.core.ranges import Tokens
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.pipeline.components import Folder, Network
from diffsynth.diffusion.pipeline.image_units import IMAGE_UNITS
from diffsynth.diffusion.pipeline.request import ImageRequest
from diffsynth.diffusion.pipeline.vae import Latents, NormalisedVAE
from diffsynth.diffusion.prompts.embedder import PromptEmbedder

SHIFT = 1.73  # of the noise levels, as released


def auraflow_sigmas(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
    """Noise levels (N,): σ' = s σ / (1 + (s - 1) σ) of linear ones from `denoising_strength` down to 1 / 1000."""
    linear = torch.linspace(denoising_strength, 1 / 1000, num_inference_steps)
    return SHIFT * linear / (1 + (SHIFT - 1) * linear)


def model_fn_auraflow(
    dit: AuraFlowTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 4, h, w) of noisy latents (B, 4, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), zero where there is padding.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    return dit(
        hidden_states=latents.to(dit.dtype),
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        timestep=timestep / 1000,
        return_dict=False,
    )[0]


class AuraFlowVAE(NormalisedVAE, AutoencoderKL):
    """The released autoencoder, that of SDXL, in normalised latents."""


class AuraFlowPromptEmbedder(PromptEmbedder):
    """Text embeddings (1, L, D) of prompts, padded to one length."""

    def tokenize(self, pipe, prompt, max_sequence_length) -> Mapping[str, Tensor]:
        options = {"truncation": True, "padding": "max_length", "return_tensors": "pt"}
        return pipe.tokenizer([prompt], max_length=max_sequence_length, **options)

    def embed(self, pipe, tokens: Mapping[str, Tensor]) -> Tensor:
        embeddings = pipe.text_encoder(**tokens).last_hidden_state
        return embeddings * tokens["attention_mask"].unsqueeze(-1)


@dataclass(kw_only=True)
class AuraFlowRequest(ImageRequest):
    """Sample one image with AuraFlow.

    Args:
        max_sequence_length: Tokens that the prompt is cut or padded to.
    """

    cfg_scale: float = 3.5
    num_inference_steps: int = 50
    max_sequence_length: Tokens = 256


class AuraFlowPipeline(BasePipeline):
    """AuraFlow on diffusers' transformer and VAE and transformers' UMT5."""

    request = AuraFlowRequest
    components = {
        "dit": Network("AuraFlowTransformer2DModel", lora="transformer"),
        "text_encoder": Network("UMT5EncoderModel", lora="text_encoder"),
        "vae": Network(AuraFlowVAE),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
    }
    latents = Latents(channels=4, factor=8, patch=2)
    model_fn = staticmethod(model_fn_auraflow)
    sigma_grid = staticmethod(auraflow_sigmas)
    model_settings = ("max_sequence_length",)
    unit_classes = (
        *IMAGE_UNITS,
        AuraFlowPromptEmbedder,
    )
