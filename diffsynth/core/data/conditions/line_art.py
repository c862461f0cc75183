"""The dark lines of an image, white on black, to train a model that colours drawings."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ...ranges import PositiveFloat, check_fields
from .base import Condition

VISIBLE, LEAST_MEDIAN, LEVEL = 8, 16, 127  # values in [0, 255] of `lineart_standard`


@dataclass(frozen=True, kw_only=True)
class LineArt(Condition):
    """How much darker a pixel is than its surroundings: max(0, min over colours of (blurred - image)), scaled.

    The scale brings the median of the visible lines to 127. This is `lineart_standard` of
    https://github.com/Mikubill/sd-webui-controlnet, which has no network.

    Args:
        sigma: Standard deviation of the Gaussian blur, in pixels of an image whose shorter side is 512.

    Raises:
        ValueError: `sigma` is not positive.
    """

    sigma: PositiveFloat = 6.0

    def __post_init__(self):
        check_fields(self)

    def __call__(self, image: Image.Image, *, rng: random.Random) -> Image.Image:
        blurred = image.filter(ImageFilter.GaussianBlur(self.sigma * min(image.size) / 512))
        darker = np.asarray(blurred, dtype=np.float32) - np.asarray(image, dtype=np.float32)
        lines = darker.min(axis=2).clip(min=0)
        visible = lines[lines > VISIBLE]
        scale = LEVEL / max(LEAST_MEDIAN, np.median(visible) if visible.size else 0)
        return Image.fromarray((lines * scale).clip(max=255).astype(np.uint8)).convert("RGB")
