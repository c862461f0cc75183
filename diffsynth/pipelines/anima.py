"""Anima: text-to-image and image-to-image.

CircleStone Labs and Comfy Org 2026, "Anima" (https://huggingface.co/circlestone-labs/Anima), from NVIDIA's
Cosmos-Predict2-2B-Text2Image. Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8), Qwen-Image's. The transformer takes videos, here of one frame, and reads 2 × 2 latent
pixels as a token. T5 only tokenizes the prompt: the text conditioner has embeddings of T5's tokens, which attend to
Qwen3's states. Constants come from the released pipeline (diffusers' modular blocks of Anima) unless a comment says
otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, within
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS
from ..diffusion.pipeline.request import ImageRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from .autoencoders.qwen_image import QwenImageVAE
from .shared.positions import check_positions

__all__ = ["AnimaPipeline", "ModelConfig"]

SHIFT = 3.0  # of the scheduler that diffusers' conversion script writes; ComfyUI's, too
MAX_PROMPT_TOKENS = 512  # of both tokenizers; the conditioner pads its outputs with zeros to as many
# NVIDIA's names of the layers, which ComfyUI and DiffSynth-Studio have, too.
BLOCK_LAYERS = {
    f"{attention}_attn.{theirs}": f"attn{number}.{own}"
    for number, attention in ((1, "self"), (2, "cross"))
    for theirs, own in {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}.items()
} | {
    f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
    for number, part in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
    for layer in (1, 2)
}
BLOCK_LAYERS |= {"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"}
LORA_NAMES = LayerNames(
    prefix="transformer",
    common="original",
    studio="original",
    original={f"blocks.*.{theirs}": f"transformer_blocks.*.{own}" for theirs, own in BLOCK_LAYERS.items()}
    | {f"t_embedder.1.linear_{layer}": f"time_embed.t_embedder.linear_{layer}" for layer in (1, 2)}
    | {f"final_layer.adaln_modulation.{layer}": f"norm_out.linear_{layer}" for layer in (1, 2)}
    | {"x_embedder.proj.1": "patch_embed.proj", "final_layer.linear": "proj_out"},
)
CONDITIONER_NAMES = LayerNames(
    prefix="text_conditioner", comfyui="diffusion_model.llm_adapter.", common="original", studio="original"
)


def anima_sigmas(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
    """Noise levels (N,) of Anima: linear, then shifted by a constant factor of 3 at every resolution."""
    return time_shift(linear_levels(num_inference_steps, denoising_strength), SHIFT)


class AnimaTransformer(CosmosTransformer3DModel):
    """The released transformer; it takes the mask of padding as `condition_mask` (B, 1, 1, h, w).

    diffusers resizes a `padding_mask` with torchvision, which nothing else here needs. Either becomes the last channel.
    """

    @property
    def config(self) -> FrozenDict:
        return FrozenDict({**super().config, "concat_padding_mask": False})  # only as it is read: it is saved unchanged


def model_fn_anima(
    dit: AnimaTransformer,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, 512, D); zeros follow those of a prompt, and are attended to.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    video = latents.to(dit.dtype).unsqueeze(2)
    velocity = dit(
        hidden_states=video,
        timestep=timestep / 1000,
        encoder_hidden_states=prompt_emb.to(dit.dtype),
        condition_mask=torch.zeros_like(video[:, :1]),  # 0: no pixel of an image is padding
        return_dict=False,
    )[0]
    return velocity.squeeze(2)


# Units ----------------------------------------------------------------------------------------------------------------


class AnimaUnit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, 512, D) of a prompt without a template, from Qwen3's states and T5's tokens."""

    def __init__(self):
        super().__init__()
        self.onload_model_names = ("text_encoder", "text_conditioner")

    def tokenize(self, pipe, prompt, max_sequence_length):
        options = {"max_length": max_sequence_length, "truncation": True, "return_tensors": "pt"}
        own = pipe.tokenizer([prompt], **options)
        absent = int(own.input_ids.shape[1] == 0)  # of an empty prompt, to which diffusers gives one token of padding
        tokens = {name: F.pad(own[name].long(), (0, absent)) for name in ("input_ids", "attention_mask")}
        queries = pipe.t5_tokenizer([prompt], padding="max_length", **options)
        return tokens | {"query_ids": queries.input_ids, "query_mask": queries.attention_mask}

    def embed(self, pipe: "AnimaPipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        states = pipe.text_encoder.get_decoder()(tokens["input_ids"], use_cache=False).last_hidden_state
        states = (states * tokens["attention_mask"].unsqueeze(-1)).to(pipe.text_conditioner.dtype)
        return pipe.text_conditioner(states, tokens["query_ids"], target_attention_mask=tokens["query_mask"])


# Pipeline -------------------------------------------------------------------------------------------------------------


def check_vocabulary(pipe: "AnimaPipeline") -> None:
    """Refuse a T5 tokenizer that makes more tokens than the text conditioner has embeddings for."""
    if pipe.t5_tokenizer is None or pipe.text_conditioner is None:
        return
    known, made = pipe.text_conditioner.config.target_vocab_size, len(pipe.t5_tokenizer)
    if made > known:
        raise ValueError(
            f"The tokenizer in {pipe.folders['t5_tokenizer']} has {made} tokens, but text_conditioner has embeddings "
            f"of {known}: it is not T5's; take the t5_tokenizer released with the model."
        )


@dataclass(kw_only=True)
class AnimaRequest(ImageRequest):
    """Sample one image with Anima.

    Args:
        max_sequence_length: Tokens that a prompt is truncated to, Qwen3's as well as T5's; 512 at most.
    """

    num_inference_steps: SamplingSteps = 50
    cfg_scale: NonNegativeFloat = 4.0
    max_sequence_length: Annotated[int, within(1, MAX_PROMPT_TOKENS)] = MAX_PROMPT_TOKENS


class AnimaPipeline(BasePipeline):
    """Anima on diffusers' Cosmos transformer, text conditioner and Qwen-Image's VAE, and transformers' Qwen3."""

    request = AnimaRequest
    components = {
        "dit": Network(AnimaTransformer, lora=LORA_NAMES),
        "text_encoder": Network("Qwen3Model", "Qwen3ForCausalLM", lora="text_encoder"),
        "text_conditioner": Network("AnimaTextConditioner", lora=CONDITIONER_NAMES),
        "vae": Network(QwenImageVAE, after=QwenImageVAE.use_single_frame_convolutions),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
        "t5_tokenizer": Folder("T5TokenizerFast", check=check_vocabulary, needed_by="text_conditioner"),
    }
    latents = Latents(channels=16, factor=8, patch=2)
    model_fn = staticmethod(model_fn_anima)
    sigma_grid = staticmethod(anima_sigmas)
    model_settings = ("max_sequence_length",)
    text_widths = {"text_conditioner": lambda dit, own: (dit.config.text_embed_dim, own.config.target_dim)}
    unit_classes = (
        *IMAGE_UNITS,
        AnimaUnit_PromptEmbedder,
    )

    def check_networks(self) -> None:
        super().check_networks()
        if self.dit is not None and self.dit.config.in_channels != self.latents.channels:
            raise ValueError(
                f"dit reads {self.dit.config.in_channels} channels, but Anima's latents have {self.latents.channels}: "
                "it is a Cosmos transformer of videos; take the transformer of model=anima."
            )
        if self.text_encoder is None or self.text_conditioner is None:
            return
        wanted, made = self.text_conditioner.config.source_dim, self.text_encoder.config.hidden_size
        if wanted != made:
            raise ValueError(
                f"text_conditioner takes states of width {wanted}, but text_encoder makes {made}: they are of "
                "different models; take the text encoder that was released with the text conditioner."
            )

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        if self.dit is not None:
            check_positions(whole, "dit", max(self.dit.rope.max_size) * self.latents.multiple)
        return whole

    def prompt_limits(self) -> dict[str, int]:
        limits = super().prompt_limits()
        return limits | ({"t5_tokenizer": self.most_tokens} if limits and self.t5_tokenizer is not None else {})
