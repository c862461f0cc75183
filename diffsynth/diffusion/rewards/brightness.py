"""`Brightness`: how near a picture's mean brightness is to a given one."""

from collections.abc import Sequence

from torch import Tensor

from ...core.ranges import NonZero, Probability, check_arguments
from .base import Reward, Rows


class Brightness(Reward):
    """Minus the squared difference of a picture's mean brightness, over pixels and channels, to a given one.

    Args:
        target: The brightness that scores best, 0; from 0 (black) to 1 (white).
    """

    differentiable = True

    def __init__(self, target: Probability = 0.7, weight: NonZero = 1.0):
        super().__init__(weight)
        check_arguments(Brightness.__init__, "reward.", target=target)
        self.target = target

    @property
    def version(self) -> str:
        return f"Brightness target={self.target}"

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], rows: Rows) -> Tensor:
        return -(pixels.float().mean((1, 2, 3)) - self.target).square()
