"""Masks: images that are white in one area and black in the other."""

import numpy as np
from PIL import Image

from ..sources.storage import EmbeddedFile
from .images import LoadImage
from .picture_files import in_mode, read_image


class LoadMask(LoadImage):
    """Loads a mask as `LoadImage` does an image, and refuses transparent pixels; see `read_mask`."""

    def __call__(self, data: str | EmbeddedFile) -> Image.Image:
        return read_mask(data, self.mode)


def is_mask(name: str) -> bool:
    """Whether a column, or an argument, of this name holds masks."""
    return name.endswith("mask")


def read_mask(file: str | EmbeddedFile, mode: str = "RGB") -> Image.Image:
    """The decoded image of a file that is a mask.

    Raises:
        ValueError: It has transparent pixels. They would become white, as in a viewer, but programs disagree on
            whether they are inside or outside of a mask.
    """
    mask = read_image(file, "RGBA")
    if mask.getchannel("A").getextrema()[0] < 255:
        raise ValueError(
            "has transparent pixels, but a mask is read by its white and black; save it without transparency, white "
            "on black"
        )
    return mask.convert(mode)


def white_area(mask: Image.Image) -> np.ndarray:
    """Where a mask is nearer to white than to black, an array (H, W) of bool."""
    return np.asarray(in_mode(mask, "L")) >= 128


def of_other_sizes(mask: str, found: tuple[int, int], image: str, wanted: tuple[int, int]) -> str:
    """What is wrong with a mask whose width and height are not its image's; `mask` and `image` name them."""
    own, other = (f"{width} x {height}" for width, height in (found, wanted))
    return f"{mask} is {own} pixels and {image} {other}; save both at one size"
