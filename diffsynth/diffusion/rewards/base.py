"""`Reward`: scores what a model has sampled; reward training raises the score, and a validation measures its mean.

Shapes: N pictures; B pictures as a tensor of pixels, H W their size in pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.ranges import NonZero, check_arguments

logger = logging.getLogger(__name__)

Pictures = Sequence[Image.Image]
Rows = Sequence[Mapping[str, Any]]


class Reward:
    """Scores pictures; a higher score is better.

    A subclass writes `score`, or `score_pixels`, from which `score` follows. The same objects are metrics of a
    validation (`find` and `measure`).

    Class attributes:
        differentiable: Whether gradients flow from the scores to the pixels; such a reward writes `score_pixels`.
        groupwise: Whether a picture's score depends on the other pictures of its prompt, as a ranking does.

    Args:
        weight: Factor of this reward's advantage beside others, not 0; a negative one lowers the score.
    """

    differentiable: ClassVar[bool] = False
    groupwise: ClassVar[bool] = False

    def __init__(self, weight: NonZero = 1.0):
        check_arguments(Reward.__init__, "reward.", weight=weight)
        self.weight = weight

    def find(self) -> None:
        """Find the packages, files and servers that `score` needs, without reading weights.

        Raises:
            ImportError, OSError: A package is not installed, weights are neither on disk nor downloadable, or a server
                does not answer.
        """

    @property
    def version(self) -> str:
        """What the scores depend on besides the pictures, such as settings and weights; one run keeps one version."""
        return type(self).__name__

    @property
    def network_bytes(self) -> int:
        """Bytes that a network of the reward takes on the device while it scores, once `find` has found its files."""
        return 0

    def check_rows(self, row: Mapping[str, Any]) -> None:
        """Refuse a row of the prompts' table that lacks a column which `score` reads.

        Raises:
            ValueError: The column is absent; names it.
        """

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        """Scores (N,), fp32 on the CPU, of N RGB pictures; NaN for one that cannot be scored.

        Args:
            prompts: The prompts (N) that they were sampled for.
            rows: The other columns (N) of the prompts' table.
            device: Device of the reward's network, which is on it only while it scores.
        """
        scores = []
        with torch.no_grad():
            for picture, prompt, row in zip(pictures, prompts, rows, strict=True):  # pictures may differ in size
                scores.append(self.score_pixels(pixels_of(picture)[None].to(device), [prompt], [row]))
        return torch.cat(scores).float().cpu()

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], rows: Rows) -> Tensor:
        """Scores (B,), through which gradients flow, of pictures (B, 3, H, W) in [0, 1], on their device."""
        raise NotImplementedError(f"{type(self).__name__} is not differentiable.")

    def measure(
        self, images: Pictures, prompts: Sequence[str], targets: Pictures | None, device: torch.device
    ) -> float:
        """The mean of the scores of sampled images, without those that are NaN; the interface of a metric."""
        scores = self.score(images, prompts, [{} for _ in images], device)
        if unscored := int(scores.isnan().sum()):
            of = type(self).__name__, unscored, len(images)
            logger.warning("%s cannot score %d of %d images; its mean is that of the others.", *of)
        return scores.nanmean().item()


def pixels_of(picture: Image.Image) -> Tensor:
    """A picture as RGB (3, H, W) in [0, 1]."""
    values = np.array(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 255
