"""`ClipReward`: rewards by CLIP, whose gradients flow to the pixels.

Shapes: B pictures, S the side of the network's input in pixels, D the width of its embeddings.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ...core.loader import read_pretrained
from .network import NetworkReward, frozen


class ClipReward(NetworkReward):
    """A reward by a CLIP in transformers' layout, with its processor's files beside its weights."""

    @property
    def processor_folder(self) -> Path:
        """Folder of the processor's files."""
        return self.folder

    @cached_property
    def network(self) -> nn.Module:
        from transformers import CLIPModel

        return frozen(read_pretrained(CLIPModel, self.folder, use_safetensors=True))

    @cached_property
    def processor(self):
        from transformers import CLIPProcessor

        return read_pretrained(CLIPProcessor, self.processor_folder)

    def prepare(self, pixels: Tensor) -> Tensor:
        """The input (B, 3, S, S) of CLIP: the shortest side resized, the middle cropped, and normalised.

        The processor rounds to 8 bits after resizing along each side; before normalisation, that is a difference of at
        most 1.25 / 255.
        """
        settings = self.processor.image_processor
        sides = pixels.shape[2:]
        pixels = resized(pixels, [settings.size["shortest_edge"] * side // min(sides) for side in sides])
        pixels = cropped(pixels, settings.crop_size["height"], settings.crop_size["width"])
        return normalised(pixels, settings.image_mean, settings.image_std)

    def image_embeddings(self, inputs: Tensor) -> Tensor:
        """Normalised embeddings (B, D) of prepared pictures."""
        features = self.network.vision_model(pixel_values=inputs).pooler_output
        return normalize(self.network.visual_projection(features), dim=1)

    def text_embeddings(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Normalised embeddings (B, D) of prompts, cut at the length that the network takes."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        features = self.network.text_model(**tokens.to(device)).pooler_output
        return normalize(self.network.text_projection(features), dim=1)

    def cosines(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine (B,) of each picture with its prompt."""
        return (self.image_embeddings(inputs) * self.text_embeddings(prompts, inputs.device)).sum(1)


def resized(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], resized to (height, width) by bicubic interpolation, as Pillow does.

    Pillow resizes each row, then each column, and clamps in between. Values that are clamped here keep their gradients:
    those of white areas would vanish.
    """
    for height, width in ((pixels.shape[2], size[1]), size):
        pixels = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
    return pixels


def cropped(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle (B, 3, height, width) of pictures (B, 3, H, W)."""
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (B, 3, H, W) whose channels have the mean 0 and the deviation 1 of the training set."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std
