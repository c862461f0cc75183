"""Canny's edges of an image, white on black: J. Canny 1986, "A Computational Approach to Edge Detection"."""

import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image, ImageFilter

from ...ranges import NonNegativeFloat, at_least, check_fields
from .base import Condition

STEEP = 1 + np.sqrt(2)  # tan 67.5°: gradients between 22.5° and 67.5° are diagonal
NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


@dataclass(frozen=True, kw_only=True)
class Canny(Condition):
    """Edges one pixel wide: the local maxima of |∂x I| + |∂y I| above `low` that are linked to one above `high`.

    With the defaults these are the edges of OpenCV's `Canny(image, 100, 200)`, which released ControlNets are trained
    on (https://arxiv.org/abs/2302.05543, whose training takes random thresholds). It is computed without OpenCV, so
    that every machine makes the same edges.

    Args:
        low, high: Thresholds of the gradient's norm, for values in [0, 255] and Sobel's filter of 3 x 3 pixels.
        spread: Both thresholds are multiplied by one random factor, log-uniform in [1 / spread, spread].
        blur: Standard deviation of a Gaussian blur before, in pixels; 0 does not blur.
        fixed: Take the same factor each time that an image is shown.

    Raises:
        ValueError: A number is out of its range, or `low` is above `high`.
    """

    low: NonNegativeFloat = 100.0
    high: NonNegativeFloat = 200.0
    spread: Annotated[float, at_least(1)] = 1.0
    blur: NonNegativeFloat = 0.0
    fixed: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}; exchange them.")

    @property
    def is_random(self) -> bool:
        return not self.fixed and self.spread > 1

    def __call__(self, image: Image.Image, *, rng: random.Random) -> Image.Image:
        factor = self.spread ** (2 * rng.random() - 1)
        blurred = image.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else image
        right, down = gradient(np.asarray(blurred, dtype=np.int16))
        norm = np.abs(right) + np.abs(down)
        weak = ridges(norm, right, down, factor * self.low)
        edges = linked(weak, weak & (norm > factor * self.high))
        return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's derivatives (H, W) to the right and downwards of an image (H, W, 3).

    Those of a pixel are of the channel in which their absolute sum is largest.
    """
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, along = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    right = across[:-2] + 2 * across[1:-1] + across[2:]
    down = along[:, :-2] + 2 * along[:, 1:-1] + along[:, 2:]
    largest = (np.abs(right) + np.abs(down)).argmax(axis=2, keepdims=True)
    return tuple(np.take_along_axis(each, largest, axis=2)[..., 0] for each in (right, down))


def ridges(norm: np.ndarray, right: np.ndarray, down: np.ndarray, low: float) -> np.ndarray:
    """Where the gradient's norm (H, W) is above `low` and above that of both neighbours in the gradient's direction."""
    rows, columns = np.nonzero(norm > low)
    centre, right, down = (each[rows, columns] for each in (norm, right, down))
    flat, steep = np.abs(down) * STEEP < np.abs(right), np.abs(down) > STEEP * np.abs(right)
    row_step, slope = np.where(flat, 0, 1), np.where((right < 0) != (down < 0), -1, 1)
    column_step = np.where(flat, 1, np.where(steep, 0, slope))
    around = np.pad(norm, 1)
    before, after = (around[1 + rows + sign * row_step, 1 + columns + sign * column_step] for sign in (-1, 1))
    found = np.zeros(norm.shape, dtype=bool)
    # Of two equal pixels along an axis the second counts, along a diagonal neither, as in OpenCV.
    found[rows, columns] = (centre > before) & np.where(flat | steep, centre >= after, centre > after)
    return found


def linked(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The pixels of `weak` (H, W) from which a path within `weak` leads to a pixel of `strong`."""
    open_, width = np.pad(weak, 1).ravel(), weak.shape[1] + 2
    steps = np.array([row * width + column for row, column in NEIGHBOURS])
    reached = np.pad(strong, 1).ravel()
    front = np.flatnonzero(reached)
    while front.size:
        near = (front[:, None] + steps).ravel()
        front = np.unique(near[open_[near] & ~reached[near]])
        reached[front] = True
    return reached.reshape(weak.shape[0] + 2, width)[1:-1, 1:-1]
