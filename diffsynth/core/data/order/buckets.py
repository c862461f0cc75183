"""Image sizes of about the same number of pixels, one for each aspect ratio: images of one size make a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt

Size = tuple[int, int]  # width, height

# The grid alone enlarges an image that has all the pixels of its budget by up to 3 % (factor 64 at 1024 x 1024).
MAX_ENLARGEMENT = 1.05


@dataclass(frozen=True)
class AspectBuckets:
    """The sizes that images are cropped to, and which image gets which.

    Args:
        max_pixels: Budgets, one or several: no bucket of a budget has more pixels.
        division_factor: Both sides of every bucket are multiples of it. Fewer buckets, which crop more, follow from a
            multiple of what the model asks for: 64 at 1024 x 1024 gives sizes of SDXL.
        max_aspect: Largest ratio of the long side to the short one.
        upscale: Whether images are shown at budgets that they are too small for.

    Raises:
        ValueError: There is no budget, one has no room for a bucket, or `max_aspect` is below 1.
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
                f"max_pixels={self.max_pixels}: give one budget or several of at least {smallest} pixels, one patch "
                f"of division_factor={self.division_factor}"
            )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} is long side over short side: give at least 1")
        object.__setattr__(self, "max_pixels", tuple(sorted(budgets)))

    def sizes(self, budget: int) -> list[Size]:
        """All buckets of one budget, from the tallest to the widest."""
        landscape = _landscape(budget, self.division_factor, self.max_aspect)
        return sorted({*landscape, *map(_turned, landscape)})

    def choose(self, width: int, height: int, budget: int) -> Size:
        """The bucket of a budget that crops an image least, that is, of the nearest aspect ratio in log space."""
        if width < height:
            return _turned(self.choose(height, width, budget))
        landscape = _landscape(budget, self.division_factor, self.max_aspect)
        return max(landscape, key=lambda bucket: kept(width, height, bucket))

    def assign(self, width: int, height: int) -> dict[int, Size]:
        """The bucket of an image at each budget that it is shown at: those it fills, at least the smallest."""
        chosen = {budget: self.choose(width, height, budget) for budget in self.max_pixels}
        if self.upscale:
            return chosen
        filled = {budget: bucket for budget, bucket in chosen.items() if not is_upscaled(width, height, bucket)}
        return filled or {self.max_pixels[0]: chosen[self.max_pixels[0]]}


def kept(width: int, height: int, bucket: Size) -> float:
    """Share of an image that is left when it covers the bucket and what overhangs is cropped."""
    # One correctly rounded division of integers: the same choice on every machine.
    across, along = width * bucket[1], height * bucket[0]
    return min(across, along) / max(across, along)


def is_upscaled(width: int, height: int, bucket: Size) -> bool:
    """Whether an image must be enlarged, by more than rounding to the grid accounts for, to cover the bucket."""
    return max(bucket[0] / width, bucket[1] / height) > MAX_ENLARGEMENT


@cache
def _landscape(max_pixels: int, factor: int, max_aspect: float) -> tuple[Size, ...]:
    """The square, then for each short side the longest side that the budget allows."""
    cells = max_pixels // factor**2
    square = isqrt(cells)
    sides = [(cells // short, short) for short in range(square, 0, -1)]
    within = [(long, short) for long, short in sides if long <= max_aspect * short]
    # A square image must have a square bucket, even where a longer one uses more of the budget.
    return tuple(dict.fromkeys((long * factor, short * factor) for long, short in [(square, square), *within]))


def _turned(size: Size) -> Size:
    return size[1], size[0]
