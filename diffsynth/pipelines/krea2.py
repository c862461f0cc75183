"""Krea 2 (Raw, Turbo): text-to-image and image-to-image.

Krea 2026, "Krea 2" (https://huggingface.co/krea/Krea-2-Raw). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8), Qwen-Image's; the transformer reads 2 × 2 latent pixels as a token, (B, H/16 · W/16, 64).
It reads the hidden states of twelve layers of Qwen3-VL for each token of the prompt and fuses them itself. Constants
come from the released pipeline (diffusers' Krea2Pipeline) unless a comment says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, shift_by_tokens, shift_of_tokens
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS
from ..diffusion.pipeline.request import ImageRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.prompts.hidden_states import hidden_states
from .autoencoders.qwen_image import QwenImageVAE
from .shared.qwen import START_TOKENS, TEMPLATE_END, TEMPLATE_START
from .shared.tokens import pack_latents, unpack_latents

__all__ = ["Krea2Pipeline", "ModelConfig"]

END_TOKENS = 5  # of the end of the template, which follows the prompt also where that is cut
FIRST_TEXT_LAYER, TEXT_LAYER_STEP = 2, 3
MAX_PROMPT_TOKENS = 512
LOW_SHIFT, HIGH_SHIFT = (256, 0.5), (6400, 1.15)  # image tokens, and μ
# Krea's names of the layers. diffusers and ComfyUI read the names here, too.
BLOCKS = {
    "blocks": "transformer_blocks",
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
}
LAYERS = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
LORA_NAMES = LayerNames(
    prefix="transformer",
    original={
        f"{theirs}.*.{name}": f"{ours}.*.{layer}" for theirs, ours in BLOCKS.items() for name, layer in LAYERS.items()
    }
    | {
        "first": "img_in",
        "last.linear": "final_layer.linear",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
    },
)


def krea2_sigmas(
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    dynamic_shift_len: int | None = None,
    exponential_shift_mu: float | None = None,
) -> Tensor:
    """Noise levels (N,) of Krea 2: linear, then shifted by a μ that is linear in the number of tokens.

    Args:
        dynamic_shift_len: Number of image tokens, H/16 · W/16; None takes the training grid's μ = 0.8.
        exponential_shift_mu: μ itself, which overrides the other two; Turbo was distilled with 1.15.
    """
    linear = linear_levels(num_inference_steps, denoising_strength)
    shift = partial(shift_of_tokens, low=LOW_SHIFT, high=HIGH_SHIFT)
    return shift_by_tokens(linear, dynamic_shift_len, exponential_shift_mu, shift)


def model_fn_krea2(
    dit: Krea2Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_mask: Tensor | None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Hidden states (B, L, layers, D) of several layers of the text encoder, right-padded.
        prompt_emb_mask: False where `prompt_emb` is padding (B, L); None if nothing is.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    height, width = (side // 2 for side in latents.shape[2:])
    velocity = dit(
        hidden_states=pack_latents(latents).to(dit.dtype),
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        timestep=timestep / 1000,
        position_ids=sent(positions(prompt_emb.shape[1], height, width), latents.device),
        encoder_attention_mask=prompt_emb_mask,
        return_dict=False,
    )[0]
    return unpack_latents(velocity, *latents.shape[2:])


def positions(length: int, height: int, width: int) -> Tensor:
    """Positions (L + h · w, 3) of tokens on the axes of RoPE, time, row and column; text tokens have 0."""
    image = torch.cartesian_prod(torch.tensor([0]), torch.arange(height), torch.arange(width))
    return torch.cat([torch.zeros(length, 3, dtype=image.dtype), image])


# Units ----------------------------------------------------------------------------------------------------------------


class Krea2Unit_PromptEmbedder(PromptEmbedder):
    """Computes the hidden states (1, L, layers, D) of a prompt in its template, and their mask (1, L).

    The released pipeline puts padding before the template's end. Padding has no position and is masked, so the result
    equals no padding.
    """

    def __init__(self):
        super().__init__(masked=True)

    def tokenize(self, pipe, prompt, max_sequence_length):
        ids = pipe.tokenizer([TEMPLATE_START + prompt + TEMPLATE_END], return_tensors="pt").input_ids
        start, end = ids.tensor_split([-END_TOKENS], dim=1)
        return {"input_ids": torch.cat([start[:, : START_TOKENS + max_sequence_length - END_TOKENS], end], dim=1)}

    def embed(self, pipe: "Krea2Pipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        decoder = pipe.text_encoder.get_decoder()
        return torch.stack(hidden_states(decoder, text_depths(decoder), **tokens), dim=2)[:, START_TOKENS:]


def text_depths(decoder: nn.Module) -> list[int]:
    """Numbers of layers after which hidden states are read: 2, 5, …, 35 of the 36 of the released text encoder."""
    return list(range(FIRST_TEXT_LAYER, decoder.config.num_hidden_layers, TEXT_LAYER_STEP))


def widths(dit: Krea2Transformer2DModel, text_encoder: nn.Module) -> tuple[str, str]:
    """Layers and widths of the text embeddings that the network takes, and of those that the text encoder makes."""
    decoder, sizes = text_encoder.get_decoder(), dit.config
    made = len(text_depths(decoder)), decoder.config.hidden_size
    return f"{sizes.num_text_layers} x {sizes.text_hidden_dim}", "{} x {}".format(*made)


# Pipeline -------------------------------------------------------------------------------------------------------------


def check_template(pipe: "Krea2Pipeline") -> None:
    """Refuse a tokenizer that makes another number of tokens from the prompt template than the released one."""
    found = [len(pipe.tokenizer(text).input_ids) for text in (TEMPLATE_START, TEMPLATE_END)]
    if found != [START_TOKENS, END_TOKENS]:
        raise ValueError(
            f"The tokenizer in {pipe.folders['tokenizer']} makes {found} tokens of the start and the end of the prompt "
            f"template, expected {[START_TOKENS, END_TOKENS]}: it is not Krea 2's; take the tokenizer released with "
            "the model."
        )


@dataclass(kw_only=True)
class Krea2Request(ImageRequest):
    """Sample one image with Krea 2.

    Args:
        max_sequence_length: Tokens of text that the transformer reads; prompts are truncated to 5 fewer.
        exponential_shift_mu: Shift of the noise levels; None computes it from the number of tokens.
    """

    num_inference_steps: SamplingSteps = 28
    cfg_scale: NonNegativeFloat = 5.5  # diffusers' guidance_scale + 1: released with 4.5
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS
    exponential_shift_mu: float | None = None


class Krea2Pipeline(BasePipeline):
    """Krea 2 on diffusers' transformer and Qwen-Image's VAE, and transformers' Qwen3-VL."""

    request = Krea2Request
    components = {
        "dit": Network("Krea2Transformer2DModel", lora=LORA_NAMES),
        "text_encoder": Network("Qwen3VLModel", "Qwen3VLForConditionalGeneration", lora="text_encoder"),
        "vae": Network(QwenImageVAE, after=QwenImageVAE.use_single_frame_convolutions),
        "tokenizer": Folder("AutoTokenizer", check=check_template, needed_by="text_encoder"),
    }
    latents = Latents(channels=16, factor=8, patch=2)
    model_fn = staticmethod(model_fn_krea2)
    sigma_grid = staticmethod(krea2_sigmas)
    model_settings = ("max_sequence_length", "exponential_shift_mu")
    text_widths = {"text_encoder": widths}
    unit_classes = (
        *IMAGE_UNITS,
        Krea2Unit_PromptEmbedder,
    )

    def prompt_text(self, prompt: str) -> str:
        return TEMPLATE_START + prompt + TEMPLATE_END

    @property
    def most_tokens(self) -> int:
        return START_TOKENS + self.call_defaults["max_sequence_length"]
