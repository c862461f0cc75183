"""The image without the area that is to be painted."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from .base import Condition, checked_mask

FILLS = {"black": (0, 0, 0), "grey": (128, 128, 128)}


@dataclass(frozen=True, kw_only=True)
class MaskedImage(Condition):
    """The image, filled with one colour where a mask is white.

    Args:
        mask: Column of the mask, which may be another condition.
        fill: "black", as ControlNets for inpainting expect, or "grey", the middle of the range of values, as Stable
            Diffusion's inpainting models expect.

    Raises:
        ValueError: `fill` is another word.
    """

    mask: str = "inpaint_mask"
    fill: Literal["black", "grey"] = "black"

    def __post_init__(self):
        if self.fill not in FILLS:
            raise ValueError(f"fill is {self.fill!r}; expected {' or '.join(FILLS)}.")

    @property
    def columns(self) -> Sequence[str]:
        return (self.mask,)

    def __call__(self, image: Image.Image, mask: Image.Image, *, rng: random.Random) -> Image.Image:
        return Image.composite(Image.new("RGB", image.size, FILLS[self.fill]), image, checked_mask(mask, image))
