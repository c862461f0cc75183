"""Rewards, one per file: they score what a model has sampled."""

from .aesthetic import Aesthetic
from .base import Pictures, Reward, Rows, pixels_of
from .brightness import Brightness
from .clip_score import ClipScore
from .colour import Colour
from .hps_v2 import HpsV2
from .http import HttpReward
from .jpeg_size import JpegSize
from .judge import Judge
from .ocr import Ocr
from .pick_score import PickScore
from .symmetry import Symmetry
from .text_match import TextMatch

__all__ = [
    "Aesthetic",
    "Brightness",
    "ClipScore",
    "Colour",
    "HpsV2",
    "HttpReward",
    "JpegSize",
    "Judge",
    "Ocr",
    "PickScore",
    "Pictures",
    "Reward",
    "Rows",
    "Symmetry",
    "TextMatch",
    "pixels_of",
]
