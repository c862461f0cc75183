"""What Qwen-Image, its successors and Krea 2 share: the template, noise levels, images for the text encoder.

Constants without a source are diffusers' (as released).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.picture_files import in_mode
from ...diffusion.adapters.names import LayerNames
from ...diffusion.flow_match import linear_levels, shift_by_tokens, shift_of_tokens, stretch_to_terminal

TEMPLATE_START = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_END = "<|im_end|>\n<|im_start|>assistant\n"
START_TOKENS = 34  # of the template before the prompt; their embeddings are dropped
IMAGE_TOKEN = "<|image_pad|>"  # placeholder of one token of an image in the text encoder
LOW_SHIFT, HIGH_SHIFT = (256, 0.5), (8192, 0.9)  # image tokens, and μ
TERMINAL_SIGMA = 0.02
TEXT_LORA_NAMES = LayerNames(prefix="text_encoder", common="comfyui")  # diffusers refuses a file of two styles


def qwen_image_sigmas(
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    dynamic_shift_len: int | None = None,
    exponential_shift_mu: float | None = None,
) -> Tensor:
    """Noise levels (N,) of Qwen-Image: linear, shifted by μ, which is linear in tokens, and stretched to end at 0.02.

    Args:
        dynamic_shift_len: Number of image tokens, H/16 · W/16; None takes the training grid's μ = 0.8.
        exponential_shift_mu: μ itself, which overrides the other two.
    """
    linear = linear_levels(num_inference_steps, denoising_strength)
    shift = partial(shift_of_tokens, low=LOW_SHIFT, high=HIGH_SHIFT)
    shifted = shift_by_tokens(linear, dynamic_shift_len, exponential_shift_mu, shift)
    return stretch_to_terminal(shifted, TERMINAL_SIGMA)


def image_patches(processor: Any, images: Sequence[Image.Image], remedy: str) -> Mapping[str, np.ndarray]:
    """The patches of images for the text encoder, as arrays, whose values a rehearsal of `plan.py` can read.

    Args:
        processor: The family's image processor.
        remedy: What to do if there is none.

    Raises:
        ValueError: There is no processor.
    """
    if processor is None:
        raise ValueError(
            "edit_image needs a processor, which prepares it for the text encoder, but model.processor is null; "
            f"{remedy}, or give from_pretrained a processor_config."
        )
    return processor([in_mode(image, "RGB") for image in images], return_tensors="np")


def image_lengths(processor: Any, patches: Mapping[str, np.ndarray]) -> list[int]:
    """Numbers of tokens that the images are in the text encoder."""
    return (patches["image_grid_thw"].prod(1) // processor.merge_size**2).tolist()


def image_inputs(tokenizer: Any, ids: Tensor, patches: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The text encoder's inputs beside token ids (1, L): the images' patches, and the types (1, L) of tokens."""
    # Without types, image tokens would have positions in a line instead of rows and columns.
    types = (ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
    return {"mm_token_type_ids": types, **{name: torch.from_numpy(array) for name, array in patches.items()}}
