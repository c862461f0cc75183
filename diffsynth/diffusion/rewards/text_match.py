"""`TextMatch`: whether a picture is what its prompt names, by a table of prompts and their pictures."""

import os
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.loaders import image_loader
from ...core.data.sources.files_read import files_of_rows
from ...core.data.sources.metadata import read_metadata
from ...core.input_files import InputFile, describe, digest_of_all
from ...core.ranges import NonZero
from .base import Pictures, Reward, pixels_of

COLUMNS = ("prompt", "image")
ROUNDING = 1e-6  # of products of fp32, which may differ for equal pictures of two prompts


class TextMatch(Reward):
    """1 if a picture is nearer, in pixels, to a target of its own prompt than to those of all others, else 0.

    NaN for a prompt that the table lacks. Chance is 1 / M for M prompts.

    Args:
        table: A table (csv, json, jsonl or parquet) with the columns `prompt` and `image`; images are files in its
            folder, all of which are kept in memory. A prompt may have several.
    """

    def __init__(self, table: str, weight: NonZero = 1.0):
        super().__init__(weight)
        self.table = table
        self._targets = cache(self._targets)  # an entry for each size of pictures

    @property
    def folder(self) -> str:
        """The folder of the table and its images."""
        return os.path.dirname(self.table)

    @cached_property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the table."""
        rows = read_metadata(self.table)
        absent = [name for name in COLUMNS if not rows or name not in rows[0]]
        if absent:
            raise ValueError(
                f"{self.table} has no column {absent[0]!r}; expected rows of prompt and image: set the reward's table."
            )
        return rows

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of the table's rows."""
        return [row["prompt"] for row in self.targets]

    def find(self) -> None:
        _ = self.prompts

    @cached_property
    def version(self) -> str:
        files = {"table": InputFile(self.table), **files_of_rows(self.targets, ["image"], self.folder)}
        return f"TextMatch {digest_of_all(describe(files))}"

    def check_rows(self, row: Mapping[str, Any]) -> None:
        if "prompt" in row and row["prompt"] not in self.prompts:
            raise ValueError(
                f"{self.table} has no picture for the prompt {row['prompt']!r:.99}; expected a row for each prompt "
                "that is sampled: add it, or set the reward's table to another."
            )

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Sequence, device: torch.device) -> Tensor:
        return torch.tensor([self._score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)])

    def _score(self, picture: Image.Image, prompt: str) -> float:
        own = torch.tensor([other == prompt for other in self.prompts])
        if not own.any():
            return float("nan")
        targets, half_norms = self._targets(picture.size)
        distances = half_norms - targets @ pixels_of(picture).flatten()  # |t - x|² / 2 but for |x|² / 2, equal for all
        return float(distances[own].min() <= distances.min() + ROUNDING * half_norms.max())

    def _targets(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The table's pictures t (M, 3 · height · width) at a size (width, height), and |t|² / 2 (M,) of each."""
        load = image_loader(self.folder)
        pictures = (load(row["image"]).resize(size, Image.Resampling.BICUBIC) for row in self.targets)
        targets = torch.stack([pixels_of(picture).flatten() for picture in pictures])
        return targets, targets.square().sum(1) / 2
