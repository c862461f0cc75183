"""The image with its details lost, to train a model that adds details or enlarges pictures ("tile")."""

import random
from dataclasses import dataclass
from typing import Annotated

from PIL import Image, ImageFilter

from ...ranges import NonNegativeFloat, at_least, check_fields
from .base import Condition


@dataclass(frozen=True, kw_only=True)
class Tile(Condition):
    """The image blurred, shrunk by a random factor, and enlarged to its size again.

    ControlNet's tile model is made for enlarging by 2, 4 and 8 (https://github.com/lllyasviel/ControlNet-v1-1-nightly);
    that factors are uniform between the smallest and the largest is a guess.

    Args:
        min_factor, max_factor: The factor is uniform between them.
        blur: Standard deviation of a Gaussian blur before, in pixels; 0 does not blur.
        fixed: Shrink an image by the same factor each time.

    Raises:
        ValueError: A number is out of its range, or `min_factor` is above `max_factor`.
    """

    min_factor: Annotated[float, at_least(1)] = 2.0
    max_factor: Annotated[float, at_least(1)] = 8.0
    blur: NonNegativeFloat = 0.0
    fixed: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.min_factor > self.max_factor:
            raise ValueError(f"min_factor={self.min_factor} is above max_factor={self.max_factor}; exchange them.")

    @property
    def is_random(self) -> bool:
        return not self.fixed and self.min_factor < self.max_factor

    def __call__(self, image: Image.Image, *, rng: random.Random) -> Image.Image:
        factor = self.min_factor + (self.max_factor - self.min_factor) * rng.random()
        small = tuple(max(1, round(side / factor)) for side in image.size)
        blurred = image.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else image
        return blurred.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
