"""The image without its colours, to train a model that colours pictures."""

import random
from dataclasses import dataclass

from PIL import Image

from .base import Condition


@dataclass(frozen=True, kw_only=True)
class Grey(Condition):
    """The luma of ITU-R BT.601, Y = 0.299 R + 0.587 G + 0.114 B, in all three channels."""

    def __call__(self, image: Image.Image, *, rng: random.Random) -> Image.Image:
        return image.convert("L").convert("RGB")
