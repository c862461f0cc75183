"""`Symmetry`: how much a picture is like its mirror image."""

from collections.abc import Sequence

from torch import Tensor

from .base import Reward, Rows


class Symmetry(Reward):
    """Minus the mean squared difference of a picture to itself mirrored left to right: from -1 to 0."""

    differentiable = True

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], rows: Rows) -> Tensor:
        pixels = pixels.float()
        return -(pixels - pixels.flip(3)).square().mean((1, 2, 3))
