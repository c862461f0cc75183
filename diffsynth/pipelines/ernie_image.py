"""ERNIE-Image (base, Turbo): text-to-image and image-to-image.

Baidu 2026, "ERNIE-Image" (https://huggingface.co/baidu/ERNIE-Image). Networks: diffusers, transformers.
Latents are (B, 128, H/16, W/16), FLUX.2's, and the transformer reads each latent pixel as a token. Constants come
from the released pipeline (diffusers' ErnieImagePipeline) unless a comment says otherwise. Its prompt enhancer, a
language model that writes longer prompts, is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ErnieImageTransformer2DModel
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, PositiveFloat, SamplingSteps
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS
from ..diffusion.pipeline.request import ImageRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.prompts.hidden_states import penultimate_state
from .autoencoders.flux2 import Flux2VAE

__all__ = ["ErnieImagePipeline", "ModelConfig"]

SHIFT = 4.0  # of the scheduler's configuration in copies of baidu/ERNIE-Image; diffusers' code does not have it
TRAINING_SHIFT = 3.0  # DiffSynth-Studio's
# The original, ComfyUI, diffusers and DiffSynth-Studio have the names here.
LORA_NAMES = LayerNames(prefix="transformer", comfyui="diffusion_model.")


def ernie_image_sigmas(
    num_inference_steps: int, denoising_strength: float = 1.0, sigma_shift: float = TRAINING_SHIFT
) -> Tensor:
    """Noise levels (N,) of ERNIE-Image: linear, then shifted by a constant factor at every resolution.

    Args:
        sigma_shift: The factor, above 0; the default is that of the training grid.
    """
    return time_shift(linear_levels(num_inference_steps, denoising_strength), sigma_shift)


class ErnieImageVAE(Flux2VAE):
    """FLUX.2's autoencoder, whose configuration here has another ε than it was trained with, as diffusers says."""

    batch_norm_eps = 1e-5


def model_fn_ernie_image(
    dit: ErnieImageTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_lengths: Sequence[Sequence[int]],
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 128, h, w) of noisy latents (B, 128, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_lengths: For each sample the number of tokens of its prompt, in a list.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    return dit(
        hidden_states=latents.to(dit.dtype),
        timestep=timestep,
        text_bth=prompt_emb.to(dit.dtype),
        text_lens=sent(torch.tensor(prompt_emb_lengths).flatten(), latents.device),
        return_dict=False,
    )[0]


# Units ----------------------------------------------------------------------------------------------------------------


class ErnieImageUnit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt without a template, and its length."""

    def __init__(self):
        super().__init__(counted=True)

    def tokenize(self, pipe, prompt):
        ids = pipe.tokenizer([prompt], truncation=True, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            ids = torch.tensor([[pipe.tokenizer.bos_token_id or 0]])
        return {"input_ids": ids}

    def embed(self, pipe: "ErnieImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return penultimate_state(pipe.text_encoder.get_decoder(), **tokens)


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ErnieImageRequest(ImageRequest):
    """Sample one image with ERNIE-Image.

    Args:
        sigma_shift: Factor that moves the noise levels towards pure noise; 1 leaves them evenly spaced.
    """

    num_inference_steps: SamplingSteps = 50
    cfg_scale: NonNegativeFloat = 4.0
    sigma_shift: PositiveFloat = SHIFT


class ErnieImagePipeline(BasePipeline):
    """ERNIE-Image on diffusers' transformer and FLUX.2's VAE, and transformers' Mistral 3."""

    request = ErnieImageRequest
    components = {
        "dit": Network("ErnieImageTransformer2DModel", lora=LORA_NAMES),
        "text_encoder": Network("Mistral3Model", lora="text_encoder"),
        "vae": Network(ErnieImageVAE),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
    }
    latents = Latents(channels=128, factor=16)
    model_fn = staticmethod(model_fn_ernie_image)
    sigma_grid = staticmethod(ernie_image_sigmas)
    model_settings = ("sigma_shift",)
    text_widths = {"text_encoder": lambda dit, own: (dit.config.text_in_dim, own.get_decoder().config.hidden_size)}
    unit_classes = (
        *IMAGE_UNITS,
        ErnieImageUnit_PromptEmbedder,
    )

    @property
    def most_tokens(self) -> int:
        return self.tokenizer.model_max_length
