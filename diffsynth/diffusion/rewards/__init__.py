"""Rewards, one per file: they score what a model has sampled."""

from .base import Pictures, Reward, Rows, pixels_of
from .brightness import Brightness
from .colour import Colour
from .jpeg_size import JpegSize
from .symmetry import Symmetry
from .text_match import TextMatch

__all__ = [
    "Brightness",
    "Colour",
    "JpegSize",
    "Pictures",
    "Reward",
    "Rows",
    "Symmetry",
    "TextMatch",
    "pixels_of",
]
