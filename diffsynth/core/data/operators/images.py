"""Operators that load, resize and crop images.

They are classes rather than closures, because DataLoader workers receive them by pickle.
"""

import math
from functools import partial

from PIL import Image

from ..sources.storage import EmbeddedFile
from ..sources.urls import is_url, read_url
from .base import Operator
from .picture_files import describe_file, describe_image, open_image, read_image, upright_size
from .unread import Unread


class LoadImage(Operator):
    """Loads an image from a path or http(s) URL, upright and in sRGB, in `mode` ("RGB", "RGBA", ...).

    The EXIF orientation and the ICC profile are applied. In a mode without alpha, transparent pixels become white, as
    in a viewer; the colour that is stored in them is arbitrary. An animation gives its first frame.
    """

    def __init__(self, mode: str = "RGB"):
        self.mode = mode

    def __call__(self, data: str) -> Image.Image:
        return read_image(data, self.mode)

    def check(self, data: str) -> tuple[int, int] | None:
        """(width, height) of the upright image, from the header; None for a URL, which only the call fetches."""
        if is_url(data):
            return None
        with open_image(data) as image:
            return upright_size(image)

    def unread(self, data: str | EmbeddedFile) -> Unread:
        with open_image(read_url(data) if is_url(data) else data) as image:
            size, description = upright_size(image), describe_image(image, self.mode)
        return Unread(size, partial(self, data), partial(describe_file, data, description))


class ImageCropAndResize(Operator):
    """Resizes an image bilinearly until it covers its target size, and crops the centre.

    The target is `height` x `width` if they are given. Otherwise it is the image's own size, reduced to at most
    `max_pixels` and never enlarged, with each side rounded down to a multiple of its division factor.

    Raises:
        ValueError: Only one of height and width is given, they are not multiples of their factors, or an image's target
            would have no pixels.
    """

    def __init__(
        self,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int = 1024 * 1024,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
    ):
        if (height is None) != (width is None):
            raise ValueError(f"{height=} and {width=}: set both for one fixed size, or neither to keep proportions")
        self.height, self.width, self.max_pixels = height, width, max_pixels
        self.height_division_factor, self.width_division_factor = height_division_factor, width_division_factor
        self.only_as_it_is = False  # set by keep_images_as_they_are: an image that would change size is an error
        if height is not None:
            require_multiple("height", height, height_division_factor)
            require_multiple("width", width, width_division_factor)

    def __call__(
        self, data: Image.Image, size: tuple[int, int] | None = None, position: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        """The image at its target size, or at `size`; `position` (x, y) of the crop is from 0 (left, top) to 1."""
        width, height = self._target(data.size, size)
        scale = max(width / data.width, height / data.height)
        left, right = part(width, round(data.width * scale), data.width, position[0])
        top, bottom = part(height, round(data.height * scale), data.height, position[1])
        # Crop and resize in one step: a strip of 1x5000 pixels, resized to a width of 512, is 2.5 million pixels high.
        return data.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))

    def check(self, data: tuple[int, int], size: tuple[int, int] | None = None) -> tuple[int, int]:
        return self._target(data, size)

    def _target(self, found: tuple[int, int], size: tuple[int, int] | None = None) -> tuple[int, int]:
        target = size or self.target_size(*found)
        if self.only_as_it_is and target != tuple(found):
            raise ValueError(
                f"it is {found[0]}x{found[1]} pixels and would become {target[0]}x{target[1]}, and no longer belong to "
                "the noise of its seed; set dataset.height and dataset.width to the size it was sampled at, or "
                "dataset.max_pixels high enough"
            )
        return target

    def unread(self, data: Unread, size: tuple[int, int] | None = None) -> Unread:
        size = self._target(data.size, size)
        return data.then(partial(self, size=size), ["crop and resize", size], size)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """The size (width, height) in pixels that an image of `width` x `height` is resized to."""
        if self.height is not None:
            return self.width, self.height
        shrink = max(1, math.sqrt(width * height / self.max_pixels))
        columns = int(width / shrink) // self.width_division_factor
        rows = int(height / shrink) // self.height_division_factor
        if columns == 0 or rows == 0:
            patch = f"{self.width_division_factor}x{self.height_division_factor}"
            raise ValueError(
                f"image {width}x{height} is smaller than one patch ({patch}) at max_pixels={self.max_pixels}; "
                "use a larger image, or set dataset.height and dataset.width"
            )
        return columns * self.width_division_factor, rows * self.height_division_factor


def part(length: int, scaled: int, side: int, position: float) -> tuple[float, float]:
    """The interval of a side, in its own pixels, that becomes `length` of the `scaled` pixels of the resized side."""
    start = round((scaled - length) * position)
    return start * side / scaled, (start + length) * side / scaled


def require_multiple(name: str, value: int, factor: int) -> None:
    """Raise ValueError unless a side is a positive multiple of its division factor."""
    if value < factor or value % factor:
        below = value // factor * factor
        sizes = f"{below + factor} or {below}" if below > 0 else str(factor)
        raise ValueError(
            f"{name}={value} is not a multiple of {name}_division_factor={factor}: set dataset.{name} to {sizes}"
        )
