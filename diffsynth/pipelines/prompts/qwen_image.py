"""Qwen-Image's prompts: templates, images that the text encoder reads, embeddings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ...diffusion.pipeline.image_units import edit_images, stretch_to_area
from ...diffusion.pipeline.request import EDIT_IMAGE_PIXELS
from ...diffusion.prompts.embedder import PromptEmbedder
from ..shared.entities import EntityEmbedder
from ..shared.qwen import (
    IMAGE_TOKEN,
    START_TOKENS,
    TEMPLATE_END,
    TEMPLATE_START,
    image_inputs,
    image_lengths,
    image_patches,
)

if TYPE_CHECKING:
    from ..qwen_image import QwenImagePipeline

PROMPT_TEMPLATE = TEMPLATE_START + "{}" + TEMPLATE_END
PROMPT_TEMPLATE_TOKENS = START_TOKENS
MAX_PROMPT_TOKENS = 1024
EDIT_PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_PROMPT_TEMPLATE_TOKENS = 64
EDIT_VISION_PIXELS = 384 * 384


class QwenImageUnit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt and its edit images, and their mask (1, L)."""

    def __init__(self):
        super().__init__(masked=True)

    def tokenize(
        self,
        pipe,
        prompt,
        edit_image=None,
        edit_image_auto_resize=True,
        edit_image_pixels=EDIT_IMAGE_PIXELS,
        edit_image_numbered=False,
        edit_vision_pixels=EDIT_VISION_PIXELS,
    ) -> dict[str, Tensor]:
        """Tokens of a prompt and its images: numbered images have a size of their own, others the autoencoder's."""
        numbered = edit_image_numbered or (isinstance(edit_image, list | tuple) and len(edit_image) > 1)
        size = (True, edit_vision_pixels) if numbered else (edit_image_auto_resize, edit_image_pixels)
        images = edit_images(edit_image, *size, stretch_to_area)
        tokens = tokens_with_images(pipe, prompt, images, numbered) if images else pipe.tokenize(prompt)
        return {**tokens, "attention_mask": torch.ones_like(tokens["input_ids"])}

    def embed(self, pipe: "QwenImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        template = EDIT_PROMPT_TEMPLATE_TOKENS if "pixel_values" in tokens else PROMPT_TEMPLATE_TOKENS
        # Without the language head, which would cost time and memory.
        return pipe.text_encoder.model(**tokens).last_hidden_state[:, template:]


def tokens_with_images(
    pipe: "QwenImagePipeline", prompt: str, images: Sequence[Image.Image], numbered: bool
) -> dict[str, Tensor]:
    """The text encoder's inputs for a prompt with images: token ids (1, L), their types (1, L), image patches.

    If `numbered`, the first image is introduced by "Picture 1: " and so on, so that the prompt can name it.
    """
    patches = image_patches(pipe.processor, images, "take a model for editing, such as model=qwen_image_edit")
    counts = image_lengths(pipe.processor, patches)
    texts = [f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>" for count in counts]
    if numbered:
        texts = [f"Picture {number}: {text}" for number, text in enumerate(texts, start=1)]
    ids = pipe.tokenizer([EDIT_PROMPT_TEMPLATE.format("".join(texts) + prompt)], return_tensors="pt").input_ids
    return {"input_ids": ids, **image_inputs(pipe.tokenizer, ids, patches)}


class QwenImageUnit_EntityEmbedder(EntityEmbedder):
    texts = QwenImageUnit_PromptEmbedder()


def check_templates(pipe: "QwenImagePipeline") -> None:
    """Refuse a tokenizer that makes another number of tokens from the prompt templates than the released one."""
    if pipe.tokenizer is None:
        return
    templates = {"prompt template": (PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS)}
    if pipe.processor is not None:
        templates["template of edit prompts"] = (EDIT_PROMPT_TEMPLATE, EDIT_PROMPT_TEMPLATE_TOKENS)
    for name, (template, tokens) in templates.items():
        found = len(pipe.tokenizer(template.split("{}")[0]).input_ids)
        if found != tokens:
            raise ValueError(
                f"The tokenizer in {pipe.folders['tokenizer']} makes {found} tokens of the {name}, expected {tokens}: "
                "it is not Qwen-Image's; take the tokenizer released with the model."
            )
