"""`Condition`, the base class of operators that make an image column from a row's image at its final size."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from graphlib import CycleError, TopologicalSorter
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from ...code_version import code_version
from ..operators.masks import of_other_sizes, white_area
from ..operators.unread import Unread


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Makes an image of the size of a row's image, which has been resized, cropped and mirrored before."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of further images that the call reads, after the row's image."""
        return ()

    @property
    def is_random(self) -> bool:
        """Whether an image gets another result each time that it is shown."""
        return False

    def __call__(self, image: Image.Image, *others: Image.Image, rng: random.Random) -> Image.Image:
        """The condition of an image.

        Args:
            image: RGB, as it is trained on.
            others: The images of `columns`.
            rng: Source of the random numbers.
        """
        raise NotImplementedError

    def make(self, name: str, images: Sequence[Image.Image | Unread], seed: int | None) -> Image.Image | Unread:
        """The condition of a row's images for its column `name`; it is unread if they are.

        Args:
            images: The row's image, then the images of `columns`.
            seed: Of the random numbers if the condition `is_random`; otherwise they depend on the image's pixels alone.
        """
        if any(isinstance(image, Unread) for image in images):
            return Unread(images[0].size, partial(_loaded, self, name, images), partial(_described, self, name, images))
        return self(*images, rng=_rng(name, images[0], seed if self.is_random else None))

    def describe(self) -> list:
        """What the result depends on besides the images, as JSON data: the class, its options and its code."""
        return [type(self).__name__, asdict(self), _code(type(self))]


def ordered(conditions: Mapping[str, Condition]) -> dict[str, Condition]:
    """The conditions by the columns that they make, each after those that it reads.

    Raises:
        ValueError: They read each other, or one reads itself.
    """
    read = {name: [column for column in made.columns if column in conditions] for name, made in conditions.items()}
    try:
        return {name: conditions[name] for name in TopologicalSorter(read).static_order()}
    except CycleError as error:
        raise ValueError(f"dataset.conditions {' and '.join(sorted(set(error.args[1])))} read each other") from None


def add_conditions(
    row: dict[str, Any], image: str, conditions: Mapping[str, Condition], seed: int | None = None
) -> None:
    """Add a column to a row for each condition of the image in its column `image`.

    Args:
        seed: Of the random numbers; see `Condition.make`.

    Raises:
        ValueError: The row has no image there, or an image does not fit its condition; the message names the column.
    """
    for name, condition in conditions.items():
        columns = (image, *condition.columns)
        wrong = [column for column in columns if not isinstance(row.get(column), Image.Image | Unread)]
        if wrong:
            raise ValueError(f"{name} is made of {wrong[0]}, which is {row.get(wrong[0])!r:.99}; expected one image")
        try:
            row[name] = condition.make(name, [row[column] for column in columns], seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _rng(name: str, image: Image.Image, seed: int | None) -> random.Random:
    key = blake2b(image.tobytes()).hexdigest() if seed is None else seed
    return random.Random(f"{key}/{name}")


def _loaded(condition: Condition, name: str, images: Sequence[Unread]) -> Image.Image:
    return condition.make(name, [image.load() for image in images], None)


def _described(condition: Condition, name: str, images: Sequence[Unread]) -> list:
    return [name, *(image.describe() for image in images), condition.describe()]


@cache
def _code(cls: type[Condition]) -> str:
    return code_version([cls.__call__, _rng], [cls])[0]


def checked_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """A mask in black and white (mode L, 0 or 255), the size of its image.

    Raises:
        ValueError: It has another size, or is black all over.
    """
    if mask.size != image.size:
        raise ValueError(of_other_sizes("the mask", mask.size, "its image", image.size))
    white = white_area(mask)
    if not white.any():
        raise ValueError(
            "the mask is black all over, so that nothing is to be painted; make an area white, or leave the row out "
            "(the crop of the image may also have cut the white area off)"
        )
    return Image.fromarray(white.astype(np.uint8) * 255)
