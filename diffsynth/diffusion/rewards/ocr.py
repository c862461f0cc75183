"""`Ocr`: whether a picture shows the text that it was asked for."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...core.ranges import NonZero
from .base import Pictures, Reward, Rows

QUOTED = re.compile(r'"([^"]*)"')
PACKAGES = ("rapidocr", "onnxruntime")


class Ocr(Reward):
    """1 - d / n: n is the length of the wanted text, d the edit distance of what is read to it; see `text_score`.

    As Flow-GRPO has it (https://arxiv.org/abs/2505.05470), with the reader RapidOCR. The reader runs on the CPU.

    Args:
        column: Column of the prompts' table that holds the wanted text; None takes what stands between the first pair
            of `"` in the prompt, and so does a validation, which has no other columns.
    """

    def __init__(self, column: str | None = None, weight: NonZero = 1.0):
        super().__init__(weight)
        self.column = column

    def find(self) -> None:
        for package in PACKAGES:
            if find_spec(package) is None:
                raise ImportError(f'{package} is not installed; pip install "diffsynth-hydra[ocr]"')

    @property
    def version(self) -> str:
        return f"Ocr rapidocr={version('rapidocr')} column={self.column}"

    def check_rows(self, row: Mapping[str, Any]) -> None:
        if self.column is not None and self.column not in row:
            raise ValueError(
                f"the prompts' table has no column {self.column!r}, which reward.ocr.column names; it has "
                f"{', '.join(row)}. Set reward.ocr.column to one of them, or to null for the text in quotes."
            )

    @cached_property
    def reader(self):
        from rapidocr import RapidOCR

        reader = RapidOCR()
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text
        return reader

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        each = zip(pictures, prompts, rows, strict=True)
        return torch.tensor([self._score(picture, self.wanted(prompt, row)) for picture, prompt, row in each])

    def wanted(self, prompt: str, row: Mapping[str, Any]) -> str | None:
        """The text that a picture should show; None if the row, or the prompt, has none."""
        if self.column is not None:
            text = row.get(self.column)
            return None if text is None else str(text)
        quoted = QUOTED.search(prompt)
        return quoted and quoted[1]

    def _score(self, picture: Image.Image, wanted: str | None) -> float:
        return float("nan") if wanted is None else text_score(self.read(picture), wanted)

    def read(self, picture: Image.Image) -> str:
        """All texts that are found in a picture, from top to bottom."""
        return " ".join(self.reader(picture.convert("RGB")).txts or ())


def text_score(read: str, wanted: str) -> float:
    """1 - d / n of what was read and what was wanted, n characters, from 0 to 1; spaces and case do not count.

    d is the Levenshtein distance, at most n, and 0 if the wanted text stands anywhere in what was read. No wanted text
    scores 1 if nothing was read, else 0.
    """
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    if not wanted:
        return float(not read)
    distance = 0 if wanted in read else min(levenshtein(read, wanted), len(wanted))
    return 1 - distance / len(wanted)


def levenshtein(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make one text the other."""
    above = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        row = [number]
        for column, match in enumerate(other, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (letter != match)))
        above = row
    return above[-1]
