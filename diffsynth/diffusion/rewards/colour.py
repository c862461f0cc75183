"""`Colour`: how near a picture's mean colour is to a given one."""

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor

from ...core.ranges import NonZero
from .base import Reward, Rows


class Colour(Reward):
    """Minus the squared distance of a picture's mean colour to a given one, in RGB of [0, 1]: from -3 to 0.

    Args:
        colour: A name of HTML, such as `red`, or `#rrggbb`.
    """

    differentiable = True

    def __init__(self, colour: str, weight: NonZero = 1.0):
        super().__init__(weight)
        try:
            self.rgb = ImageColor.getrgb(colour)[:3]
        except ValueError as error:
            raise ValueError(
                f"reward.colour is {colour!r}; expected a name such as red, or six hexadecimal digits such as #ff8000."
            ) from error

    @property
    def version(self) -> str:
        return f"Colour {self.rgb}"

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], rows: Rows) -> Tensor:
        target = torch.tensor(self.rgb, device=pixels.device) / 255
        return -(pixels.float().mean((2, 3)) - target).square().sum(1)
