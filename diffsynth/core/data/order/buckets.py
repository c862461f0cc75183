"""Aspect ratio buckets: image sizes with about the same number of pixels, so that images of one size form batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt

Size = tuple[int, ...]  # (width, height) of images, (width, height, frames) of videos

# Rounding to the grid enlarges an image with as many pixels as its budget by up to 3 % (division_factor=64 at 1024 x
# 1024, computed); 5 % leaves a margin, which is a guess.
MAX_ENLARGEMENT = 1.05


@dataclass(frozen=True)
class AspectBuckets:
    """The sizes (buckets) that images are resized and cropped to, and the choice of a bucket for an image.

    Args:
        max_pixels: One or several budgets; each is the most pixels of its buckets.
        division_factor: Both sides of every bucket are multiples of it. A multiple of the model's own factor gives
            fewer buckets, which crop more; 64 at 1024 x 1024 gives sizes of SDXL.
        max_aspect: Largest ratio of the long side to the short side.
        upscale: Whether images are also trained at budgets that they are too small for.

    Raises:
        ValueError: There is no budget, a budget is smaller than one cell of the grid, or `max_aspect` is below 1.
    """

    max_pixels: int | Sequence[int] = 1024 * 1024
    division_factor: int = 16
    max_aspect: float = 2.0
    upscale: bool = False

    def __post_init__(self):
        budgets = {self.max_pixels} if isinstance(self.max_pixels, int) else set(self.max_pixels)
        smallest = self.division_factor**2
        if not budgets or min(budgets) < smallest:
            raise ValueError(
                f"max_pixels={self.max_pixels}: set one budget or several of at least {smallest} pixels, one patch of "
                f"division_factor={self.division_factor}"
            )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} is long side over short side; set it to at least 1")
        object.__setattr__(self, "max_pixels", tuple(sorted(budgets)))

    def sizes(self, budget: int) -> list[Size]:
        """All buckets of a budget, from the tallest to the widest."""
        landscape = _landscape(budget, self.division_factor, self.max_aspect)
        return sorted({*landscape, *map(_turned, landscape)})

    def choose(self, width: int, height: int, budget: int) -> Size:
        """The bucket of a budget that crops an image least: the one with the nearest aspect ratio in log space."""
        if width < height:
            return _turned(self.choose(height, width, budget))
        landscape = _landscape(budget, self.division_factor, self.max_aspect)
        return max(landscape, key=lambda bucket: kept(width, height, bucket))

    def assign(self, width: int, height: int) -> dict[int, Size]:
        """The buckets of an image by budget, for the budgets that it fills without being enlarged, or the smallest."""
        chosen = {budget: self.choose(width, height, budget) for budget in self.max_pixels}
        if self.upscale:
            return chosen
        filled = {budget: bucket for budget, bucket in chosen.items() if not is_upscaled(width, height, bucket)}
        return filled or {self.max_pixels[0]: chosen[self.max_pixels[0]]}


def shown(size: Size) -> str:
    """A size for messages: 832 x 480 pixels, 81 frames."""
    pixels = f"{size[0]} x {size[1]} pixels"
    return pixels if len(size) == 2 else f"{pixels}, {size[2]} frame{'s' * (size[2] != 1)}"


def kept(width: int, height: int, bucket: Size) -> float:
    """The fraction of an image's area that remains when it covers the bucket and is cropped to it."""
    # One correctly rounded division of integers gives the same choice on every machine.
    across, along = width * bucket[1], height * bucket[0]
    return min(across, along) / max(across, along)


def is_upscaled(width: int, height: int, bucket: Size) -> bool:
    """Whether an image must be enlarged by more than `MAX_ENLARGEMENT` to cover the bucket."""
    return max(bucket[0] / width, bucket[1] / height) > MAX_ENLARGEMENT


@cache
def _landscape(max_pixels: int, factor: int, max_aspect: float) -> tuple[Size, ...]:
    """The square bucket, then for each short side the bucket with the longest side that the budget allows."""
    cells = max_pixels // factor**2
    square = isqrt(cells)
    sides = [(cells // short, short) for short in range(square, 0, -1)]
    within = [(long, short) for long, short in sides if long <= max_aspect * short]
    # The square comes first, because a longer bucket with the same short side may use more of the budget.
    return tuple(dict.fromkeys((long * factor, short * factor) for long, short in [(square, square), *within]))


def _turned(size: Size) -> Size:
    """Width and height exchanged."""
    return size[1], size[0]
