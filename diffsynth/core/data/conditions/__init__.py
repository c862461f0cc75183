"""Conditions: images that are made from a row's image while it is read, such as its edges or a mask for inpainting."""

from .base import Condition
from .canny import Canny
from .grey import Grey
from .line_art import LineArt
from .masked_image import MaskedImage
from .random_mask import RandomMask
from .tile import Tile

__all__ = ["Canny", "Condition", "Grey", "LineArt", "MaskedImage", "RandomMask", "Tile"]
