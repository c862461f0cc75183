"""FLUX.2 (dev, klein): text-to-image and image-to-image, editing one or several images.

Black Forest Labs 2025, "FLUX.2" (https://bfl.ai/blog/flux-2). Networks: diffusers, transformers.
Latents are (B, 128, H/16, W/16), and the transformer reads each latent pixel as a token. Edit images are further image
tokens. Constants come from the released pipeline (diffusers' Flux2Pipeline) unless a comment says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, Tokens
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, shift_by_tokens
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS, EditImageEmbedder
from ..diffusion.pipeline.kv_cache import KVCache
from ..diffusion.pipeline.request import EditRequest, TemplateRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.template.cache import append_text
from ..diffusion.template.lora import InputLoRA, added
from .autoencoders.flux2 import Flux2VAE
from .networks.flux2 import LORA_NAMES, use_joint_attention
from .shared.flux import embedding_widths, grid_positions, text_embeddings
from .shared.tokens import flatten_latents, unflatten_latents

__all__ = ["Flux2ImagePipeline", "ModelConfig"]

MAX_PROMPT_TOKENS = 512  # including the chat template's
EDIT_IMAGE_TIME = 10  # distance between edit images on the first axis of positions
TEXT_DEPTHS = 3  # hidden states of the text encoder are read after 1/4, 2/4 and 3/4 of its layers
MANY_TOKENS = 4300  # above, μ does not depend on the number of steps


def flux2_sigmas(
    num_inference_steps: int, denoising_strength: float = 1.0, dynamic_shift_len: int | None = None
) -> Tensor:
    """Noise levels (N,) of FLUX.2: linear down to 1 / N, then shifted by a μ that depends on tokens and steps.

    Args:
        dynamic_shift_len: Number of image tokens, H/16 · W/16; None takes the training grid's μ = 0.8.
    """
    linear = linear_levels(num_inference_steps, denoising_strength, last=1 / num_inference_steps)
    return shift_by_tokens(linear, dynamic_shift_len, None, partial(_empirical_shift, steps=num_inference_steps))


def _empirical_shift(tokens: int, steps: int) -> float:
    """The released μ: linear in the number of tokens at 10 and at 200 steps, and interpolated between these."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > MANY_TOKENS:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (steps - 200) * (at_200 - at_10) / (200 - 10)


def model_fn_flux2(
    dit: Flux2Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    edit_latents: Sequence[Tensor] = (),
    embedded_guidance: float | Sequence[float] = 1.0,
    kv_cache: KVCache | None = None,
    lora: InputLoRA | None = None,
    extra_text_embedding: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 128, h, w) of noisy latents (B, 128, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D); the network was trained to attend to padding, too.
        edit_latents: Clean latents (B, 128, h', w') of each edit image, of their own sizes.
        embedded_guidance: Guidance scale, one or B, an input of guidance-distilled networks; others ignore it.
        kv_cache: Extra keys and values by block, `double_0`, `single_0` and so on.
        lora: Updates of the transformer's layers.
        extra_text_embedding: Text embeddings (B, L', D) appended to the prompt's.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    images = [latents, *edit_latents]
    image_ids = [grid_positions(EDIT_IMAGE_TIME * number, *image.shape[2:], 1) for number, image in enumerate(images)]
    text, _ = append_text(prompt_emb, None, extra_text_embedding)
    with added(dit, lora):
        velocity = dit(
            hidden_states=torch.cat([flatten_latents(image) for image in images], dim=1).to(dit.dtype),
            timestep=timestep / 1000,
            guidance=sent(torch.as_tensor(embedded_guidance), latents.device).expand(len(latents)),
            encoder_hidden_states=text.to(dit.dtype),
            img_ids=sent(torch.cat(image_ids), latents.device),
            txt_ids=sent(grid_positions(0, 1, 1, text.shape[1]), latents.device),
            joint_attention_kwargs={"kv_cache": kv_cache} if kv_cache else None,
            return_dict=False,
        )[0]
    height, width = latents.shape[2:]
    return unflatten_latents(velocity[:, : height * width], height, width)


# Units ----------------------------------------------------------------------------------------------------------------


class Flux2Unit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, 3 D) of prompts in their chat template, padded to one length."""

    def tokenize(self, pipe, prompt, max_sequence_length) -> Mapping[str, Tensor]:
        return pipe.tokenize(prompt, max_sequence_length)

    def embed(self, pipe: "Flux2ImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        decoder = pipe.text_encoder.get_decoder()  # without the language head, which would cost time and memory
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return text_embeddings(decoder, TEXT_DEPTHS, **inputs)


# Pipeline -------------------------------------------------------------------------------------------------------------


def check_chat_template(pipe: "Flux2ImagePipeline") -> None:
    """Refuse a tokenizer without a chat template, into which prompts are put."""
    if pipe.tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer in {pipe.folders['tokenizer']} has no chat template, into which prompts are put; expected "
            "one in its chat_template.jinja or tokenizer_config.json. Take the tokenizer released with the model."
        )


@dataclass(kw_only=True)
class Flux2Request(EditRequest, TemplateRequest):
    """Sample one image with FLUX.2.

    Args:
        embedded_guidance: Guidance scale that dev reads as an input; klein ignores it.
        max_sequence_length: Tokens that the prompt is truncated or padded to, including the chat template's.
    """

    embedded_guidance: NonNegativeFloat = 4.0
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class Flux2ImagePipeline(BasePipeline):
    """FLUX.2 on diffusers' transformer and VAE and transformers' Qwen3 (klein) or Mistral 3 (dev)."""

    request = Flux2Request
    components = {
        "dit": Network("Flux2Transformer2DModel", after=use_joint_attention, lora=LORA_NAMES),
        "text_encoder": Network("Qwen3ForCausalLM", "Mistral3ForConditionalGeneration", lora="text_encoder"),
        "vae": Network(Flux2VAE),
        "tokenizer": Folder("AutoTokenizer", check=check_chat_template, needed_by="text_encoder"),
    }
    latents = Latents(channels=128, factor=16)
    model_fn = staticmethod(model_fn_flux2)
    sigma_grid = staticmethod(flux2_sigmas)
    model_settings = ("max_sequence_length", "edit_image_pixels")
    text_widths = {"text_encoder": partial(embedding_widths, count=TEXT_DEPTHS)}
    unit_classes = (
        *IMAGE_UNITS,
        EditImageEmbedder,
        Flux2Unit_PromptEmbedder,
    )

    def tokenize(self, prompt: str, max_sequence_length: int) -> Mapping[str, Tensor]:
        """Token ids and mask (1, max_sequence_length) of a prompt in its chat template."""
        return self.tokenizer(
            [self.prompt_text(prompt)],
            add_special_tokens=False,  # the chat template has added them
            padding="max_length",
            truncation=True,
            max_length=max_sequence_length,
            return_tensors="pt",
        )

    def prompt_text(self, prompt: str) -> str:
        """The prompt in the chat template of its text encoder.

        For Qwen3 (klein) it is a question with the beginning of an answer without thinking; for Mistral 3 (dev) it
        follows a system message.
        """
        if self.text_encoder.config.model_type == "qwen3":
            question = [{"role": "user", "content": prompt}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
            return self.tokenizer.apply_chat_template(question, tokenize=False, **options)
        texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def prompt_limits(self) -> dict[str, int]:
        return {} if self.text_encoder is None else super().prompt_limits()  # it decides the template

    def prompt_tokens(self, tokenizer: str, prompt: str) -> Sequence[int]:
        return self.tokenizer(self.prompt_text(prompt), add_special_tokens=False, verbose=False).input_ids
