"""Random masks for inpainting: white is to be painted."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ...ranges import NonNegativeFloat, PositiveFraction, Probability, check_fields
from .base import Condition, checked_mask

# LaMa's masks, in configs/training/data/abl-04-256-mh-dist-web.yaml of https://github.com/advimman/lama; lengths are
# fractions of the shorter side, which is 256 pixels there.
STROKES, SEGMENTS = (1, 6), (1, 5)  # strokes of a mask, segments of a stroke
LENGTH, WIDTH = (10 / 256, 210 / 256), (5 / 256, 105 / 256)  # of a segment
BOXES, SIDE, MARGIN = (1, 4), (30 / 256, 150 / 256), 10 / 256
LEAST_RANGE = 0.05  # between the least and the largest area; in a narrower one few shapes fit, a guess
TRIES = 100  # shapes that are drawn for one mask; a guess, which the defaults never reach


@dataclass(frozen=True, kw_only=True)
class RandomMask(Condition):
    """A mask of brush strokes, of boxes, of the objects in a column, or of the whole image, chosen at random.

    Strokes and boxes follow LaMa, Suvorov et al. 2021, §2.3 (https://arxiv.org/abs/2109.07161), with directions
    uniform in [0, 2π). Shapes are added until their number is reached and their area is at least `min_area`; one that
    would raise the area above `max_area` is left out.

    Args:
        strokes, boxes, objects: Weights of the kinds; LaMa's are 1, 1 and 0.
        whole: Probability of a mask that is white all over, which comes before the weights. Stable Diffusion's
            inpainting model was trained with 0.25 (its model card), LaMa with 0.
        min_area, max_area: Least and largest white area of strokes and boxes, as fractions of the image. 19 of 20 of
            LaMa's masks are in the default range (6000 masks, measured 2026-11-30).
        object_column: Column of masks whose white area is an object.
        fixed: Give an image the same mask each time.

    Raises:
        ValueError: A number is out of its range, all weights are 0, or `max_area` is not 0.05 above `min_area`.
    """

    strokes: NonNegativeFloat = 1.0
    boxes: NonNegativeFloat = 1.0
    objects: NonNegativeFloat = 0.0
    whole: Probability = 0.25
    min_area: PositiveFraction = 0.05
    max_area: PositiveFraction = 0.8
    object_column: str = "object_mask"
    fixed: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.strokes + self.boxes + self.objects == 0:
            raise ValueError("strokes, boxes and objects are all 0; expected at least one weight above 0.")
        if round(self.max_area - self.min_area, 6) < LEAST_RANGE:
            raise ValueError(
                f"min_area={self.min_area} and max_area={self.max_area}; set max_area at least {LEAST_RANGE} above it."
            )

    @property
    def columns(self) -> Sequence[str]:
        return (self.object_column,) if self.objects else ()

    @property
    def is_random(self) -> bool:
        return not self.fixed

    def __call__(self, image: Image.Image, *objects: Image.Image, rng: random.Random) -> Image.Image:
        is_whole = rng.random() < self.whole
        (kind,) = rng.choices(("strokes", "boxes", "objects"), (self.strokes, self.boxes, self.objects))
        if is_whole:
            return Image.new("L", image.size, 255)
        if kind == "objects":
            return checked_mask(objects[0], image)
        draw, counts = {"strokes": (draw_stroke, STROKES), "boxes": (draw_box, BOXES)}[kind]
        return self._of_shapes(image.size, draw, rng.randint(*counts), rng)

    def _of_shapes(self, size: tuple[int, int], draw: Callable, count: int, rng: random.Random) -> Image.Image:
        mask, shapes = Image.new("L", size), 0
        for _ in range(TRIES):
            larger = mask.copy()
            draw(ImageDraw.Draw(larger), size, rng)
            if area(larger) <= self.max_area:
                mask, shapes = larger, shapes + 1
            if shapes >= count and area(mask) >= self.min_area:
                return mask
        return band(size, self.min_area, self.max_area, rng)


def draw_stroke(canvas: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> None:
    """Draw a brush stroke of several segments, each with a length, a width and a direction of its own."""
    side = min(size)
    x, y = (length * rng.random() for length in size)
    for _ in range(rng.randint(*SEGMENTS)):
        angle, length, radius = rng.uniform(0, 2 * math.pi), side * rng.uniform(*LENGTH), side * rng.uniform(*WIDTH) / 2
        end = _within(x + length * math.cos(angle), size[0]), _within(y + length * math.sin(angle), size[1])
        canvas.line([(x, y), end], fill=255, width=max(1, round(2 * radius)))
        for a, b in ((x, y), end):  # round ends
            canvas.ellipse([a - radius, b - radius, a + radius, b + radius], fill=255)
        x, y = end


def _within(position: float, length: int) -> float:
    return min(max(position, 0), length)


def draw_box(canvas: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> None:
    """Draw a box with sides of random lengths, inside of a margin."""
    side, sides = min(size), [min(size) * rng.uniform(*SIDE) for _ in size]
    margin = MARGIN * side
    left, top = (rng.uniform(margin, length - margin - box) for length, box in zip(size, sides, strict=True))
    canvas.rectangle([left, top, left + sides[0], top + sides[1]], fill=255)


def area(mask: Image.Image) -> float:
    """The white fraction of a mask."""
    return mask.histogram()[255] / (mask.width * mask.height)


def band(size: tuple[int, int], least: float, most: float, rng: random.Random) -> Image.Image:
    """Fallback: a full-width band with an allowed area."""
    width, height = size
    pixels = np.zeros(width * height, dtype=np.uint8)
    fewest = max(1, math.ceil(least * pixels.size))
    pixels[: rng.randint(fewest, max(fewest, math.floor(most * pixels.size)))] = 255
    return Image.fromarray(np.roll(pixels, rng.randrange(height) * width).reshape(height, width))
