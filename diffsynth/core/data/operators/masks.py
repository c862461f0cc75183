"""Masks: images that are white in one area and black in the other."""

import numpy as np
from PIL import Image

from .picture_files import in_mode


def white_area(mask: Image.Image) -> np.ndarray:
    """Where a mask is nearer to white than to black, an array (H, W) of bool."""
    return np.asarray(in_mode(mask, "L")) >= 128


def of_other_sizes(mask: str, found: tuple[int, int], image: str, wanted: tuple[int, int]) -> str:
    """What is wrong with a mask whose width and height are not its image's; `mask` and `image` name them."""
    own, other = (f"{width} x {height}" for width, height in (found, wanted))
    return f"{mask} is {own} pixels and {image} {other}; save both at one size"
