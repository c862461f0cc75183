"""Qwen-Image-2.1: text-to-image and image-to-image with alpha, editing one or several images.

Qwen team 2026, "Qwen-Image-2.1" (https://huggingface.co/Qwen/Qwen-Image-2.1). Networks: diffusers, transformers.
Images are RGBA. Latents are (B, 64, H/16, W/16), and the transformer reads each latent pixel as a token; those of 2 × 2
come together. Text, images to edit and the image are one sequence: a token attends to earlier tokens, and the tokens of
an image attend to each other. Constants come from the released pipeline (diffusers' QwenImage21Pipeline).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage21
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.pipeline import image_units
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.media import ImageMedia
from ..diffusion.pipeline.request import EDIT_IMAGE_PIXELS, EditRequest
from ..diffusion.pipeline.vae import Latents, SingleFrameVAE
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.prompts.hidden_states import hidden_states
from .networks.qwen_image_21 import QwenImage21Transformer
from .shared.qwen import (
    IMAGE_TOKEN,
    TEXT_LORA_NAMES,
    image_inputs,
    image_lengths,
    image_patches,
    qwen_image_sigmas,
)

__all__ = ["ModelConfig", "QwenImage21Pipeline"]

SYSTEM_MESSAGE = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"  # its states are dropped
PROMPT_START, PROMPT_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
MAX_POSITIONS = 8191  # of text before the image; the table of rotations has 8192
# ComfyUI fuses the two layers of a feed-forward network that read its input.
LORA_NAMES = LayerNames(
    prefix="transformer",
    comfyui="diffusion_model.",
    common="comfyui",
    original={
        "transformer_blocks.*.img_mlp.gate_up": (
            "transformer_blocks.*.img_mlp.gate_layer",
            "transformer_blocks.*.img_mlp.proj",
        )
    },
)


# Networks -------------------------------------------------------------------------------------------------------------


class QwenImage21VAE(SingleFrameVAE, AutoencoderKLQwenImage21):
    """The released autoencoder of RGBA images (B, 4, H, W)."""


def model_fn_qwen_image_21(
    dit: QwenImage21Transformer,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_lengths: Sequence[Sequence[int]],
    edit_latents: Sequence[Tensor] = (),
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 64, h, w) of noisy latents (B, 64, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_lengths: For each sample the numbers of tokens before each image to edit, and after them.
        edit_latents: Clean latents (B, 64, h', w') of each image to edit, of their own sizes.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    images = [image.to(dit.dtype) for image in (*edit_latents, latents)]
    return dit(images, prompt_emb.to(dit.dtype), prompt_emb_lengths, timestep / 1000)


# Units ----------------------------------------------------------------------------------------------------------------


class QwenImage21Unit_EditImageEmbedder(image_units.EditImageEmbedder):
    resize = staticmethod(image_units.stretch_to_area)
    needs = "processor"
    model_with_it = "the processor of model=qwen_image_21"


class QwenImage21Unit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt, which has seen the edit images, and the lengths of its pieces."""

    def __init__(self):
        super().__init__(counted=True)

    def tokenize(
        self, pipe, prompt, edit_image=None, edit_image_auto_resize=True, edit_image_pixels=EDIT_IMAGE_PIXELS
    ) -> dict[str, Tensor]:
        options = (edit_image_auto_resize, edit_image_pixels, image_units.stretch_to_area)
        images = image_units.edit_images(edit_image, *options, pipe.media.mode, pipe.latents.multiple)
        return pipe.tokenize(prompt, images)

    def embed(self, pipe: "QwenImage21Pipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        model = pipe.text_encoder.model  # without the language head, which would cost time and memory
        decoder = model.get_decoder()
        (states,) = hidden_states(decoder, [decoder.config.num_hidden_layers], around=model, **tokens)
        return states


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class QwenImage21Request(EditRequest):
    """Sample one image with Qwen-Image-2.1, which is distilled: it needs no guidance."""

    num_inference_steps: SamplingSteps = 40
    cfg_scale: NonNegativeFloat = 1.0


class QwenImage21Pipeline(BasePipeline):
    """Qwen-Image-2.1 on diffusers' transformer and VAE and transformers' Qwen3-VL."""

    request = QwenImage21Request
    components = {
        "dit": Network(QwenImage21Transformer, after=QwenImage21Transformer.use_segments, lora=LORA_NAMES),
        "text_encoder": Network("Qwen3VLForConditionalGeneration", lora=TEXT_LORA_NAMES),
        "vae": Network(QwenImage21VAE),
        "tokenizer": Folder("Qwen2Tokenizer", needed_by="text_encoder"),
        "processor": Folder("Qwen2VLImageProcessorPil"),  # torchvision's differs a little
    }
    latents = Latents(channels=64, factor=16, group=2)
    media = ImageMedia("RGBA")
    model_fn = staticmethod(model_fn_qwen_image_21)
    sigma_grid = staticmethod(qwen_image_sigmas)
    model_settings = ("edit_image_pixels",)
    most_tokens = MAX_POSITIONS
    text_widths = {"text_encoder": lambda dit, own: (dit.config.context_in_dim, own.config.text_config.hidden_size)}
    unit_classes = (
        *image_units.IMAGE_UNITS,
        QwenImage21Unit_PromptEmbedder,
        QwenImage21Unit_EditImageEmbedder,
    )

    def tokenize(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor | list[slice]]:
        """The text encoder's inputs for a prompt with images, and which of its states are those of text.

        The end of a prompt that is too long is cut off. States of images are dropped, because the transformer has their
        latents instead.
        """
        patches = image_patches(self.processor, images, "take that of model=qwen_image_21") if images else {}
        counts = image_lengths(self.processor, patches) if images else []
        text, place, kept, run = SYSTEM_MESSAGE, self._count(SYSTEM_MESSAGE), [], PROMPT_START
        for number, count in enumerate(counts, start=1):
            run += f"{' ' if kept else ''}<image{number}><|vision_start|>"
            kept.append(slice(place, place + self._count(run)))
            place, text, run = kept[-1].stop + count, text + run + IMAGE_TOKEN * count, "<|vision_end|>"
        ids = self.tokenizer([text + run + (prompt or " ") + PROMPT_END], return_tensors="pt").input_ids
        taken = sum(max(image.size) // self.latents.factor for image in images)
        ids = self._shortened(ids, self._count(SYSTEM_MESSAGE) + sum(counts) + MAX_POSITIONS - taken)
        if not images:
            return {"input_ids": ids, "kept": [slice(place, None)]}
        others = image_inputs(self.tokenizer, ids, patches)
        return {"input_ids": ids, "kept": [*kept, slice(place, None)], **others}

    def _count(self, text: str) -> int:
        """Number of tokens of a text before a special token."""
        whole, end = (len(self.tokenizer([own]).input_ids[0]) for own in (text + PROMPT_END, PROMPT_END))
        return whole - end

    def _shortened(self, ids: Tensor, most: int) -> Tensor:
        """Token ids (1, L) without the last ones of the prompt, if there are more than `most`."""
        end = len(self.tokenizer([PROMPT_END]).input_ids[0])
        return ids if ids.shape[1] <= most else torch.cat([ids[:, : most - end], ids[:, -end:]], dim=1)

    def prompt_text(self, prompt: str) -> str:
        return PROMPT_START + prompt + PROMPT_END
