"""`FrameTimes`: the times at which the frames of a video appear, and the frames at a rate that follow from them."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..operators.video import ROUNDING


@dataclass(frozen=True)
class FrameTimes:
    """The times at which frames appear, as multiples of `unit` seconds.

    Args:
        starts: Time of each frame (N,), int64, ascending.
        end: The time at which the last frame disappears.
    """

    starts: np.ndarray
    end: int
    unit: Fraction

    def ticks(self, rate: float) -> int:
        """Number of frames at `rate` per second: the first, and those of later ticks before `end`."""
        length = (self.end - int(self.starts[0])) * self.unit - ROUNDING
        return max(1, math.ceil(length * Fraction(rate)))

    def at(self, rate: float, first: int, count: int) -> list[int]:
        """Numbers of the stored frames that are on the screen at ticks `first` to `first + count - 1`."""
        ticks = [(Fraction(tick) / Fraction(rate) + ROUNDING) / self.unit for tick in range(first, first + count)]
        passed = [int(self.starts[0]) + math.floor(tick) for tick in ticks]
        numbers = np.searchsorted(self.starts, passed, side="right") - 1
        return [0 if tick == 0 else int(number) for tick, number in enumerate(numbers, first)]
