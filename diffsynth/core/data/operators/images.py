"""From a cell of the metadata to a value a pipeline takes: small callables that compose with `>>`.

They are classes rather than closures because DataLoader workers receive them by pickle.
"""

import math
from functools import partial

from PIL import Image

from ..sources.storage import EmbeddedFile
from .base import Operator
from .picture_files import as_shown, describe_file, is_url, open_image, read_url, upright_size
from .unread import Unread


class LoadImage(Operator):
    """Image of a path or http(s) URL, upright (EXIF orientation applied), as `mode` ("RGB", "RGBA", ...).

    A mode without alpha shows what is transparent on white, as a viewer does: the colour stored there is whatever the
    program that saved it left behind. Of an animation it is the first frame.
    """

    def __init__(self, mode: str = "RGB"):
        self.mode = mode

    def __call__(self, data: str) -> Image.Image:
        with open_image(read_url(data) if is_url(data) else data) as image:
            return as_shown(image, self.mode)

    def check(self, data: str) -> tuple[int, int] | None:
        """(width, height) as shown, read from the header; None for a URL, which is fetched only when it is used."""
        if is_url(data):
            return None
        with open_image(data) as image:
            return upright_size(image)

    def unread(self, data: str | EmbeddedFile) -> Unread:
        with open_image(read_url(data) if is_url(data) else data) as image:
            size = upright_size(image)
        return Unread(size, partial(self, data), partial(describe_file, data, ["image", self.mode]))


class ImageCropAndResize(Operator):
    """Scales an image to cover its target size, bilinearly, and crops the centre.

    The target is `height` x `width` if given. Otherwise it is the image's own size, shrunk to at most `max_pixels`
    (never enlarged), each side rounded down to a multiple of its division factor.

    Raises:
        ValueError: Only one of height and width is given, they are no multiples of their factors, or an image's
            target would have no pixel.
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
            raise ValueError(f"{height=} and {width=}: give both for one fixed size, or neither to keep proportions")
        self.height, self.width, self.max_pixels = height, width, max_pixels
        self.height_division_factor, self.width_division_factor = height_division_factor, width_division_factor
        self.only_as_it_is = False  # refuse what would change size
        if height is not None:
            require_multiple("height", height, height_division_factor)
            require_multiple("width", width, width_division_factor)

    def __call__(
        self, data: Image.Image, size: tuple[int, int] | None = None, position: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        """An image at its target size, or at `size`; `position` is which part is kept, (0, 0) left and top."""
        width, height = self._target(data.size, size)
        scale = max(width / data.width, height / data.height)
        left, right = part(width, round(data.width * scale), data.width, position[0])
        top, bottom = part(height, round(data.height * scale), data.height, position[1])
        # Only what is kept is resized: 512 pixels wide, a strip of 1x5000 would be 2.5 million high.
        return data.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))

    def check(self, data: tuple[int, int], size: tuple[int, int] | None = None) -> tuple[int, int]:
        return self._target(data, size)

    def _target(self, found: tuple[int, int], size: tuple[int, int] | None = None) -> tuple[int, int]:
        target = size or self.target_size(*found)
        if self.only_as_it_is and target != tuple(found):
            raise ValueError(
                f"it is {found[0]}x{found[1]} pixels and would become {target[0]}x{target[1]}, which is no longer what "
                "its seed draws; set dataset.height and dataset.width to the size it was drawn at, or "
                "dataset.max_pixels high enough"
            )
        return target

    def unread(self, data: Unread, size: tuple[int, int] | None = None) -> Unread:
        size = self._target(data.size, size)
        return data.then(partial(self, size=size), ["crop and resize", size], size)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels that an image of `width` x `height` becomes."""
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
    """Both ends of `length` pixels of a side scaled to `scaled` pixels, in pixels of the `side` itself."""
    start = round((scaled - length) * position)
    return start * side / scaled, (start + length) * side / scaled


def require_multiple(name: str, value: int, factor: int) -> None:
    if value < factor or value % factor:
        below = max(value // factor, 1) * factor
        raise ValueError(f"{name}={value} is not a multiple of {name}_division_factor={factor}: use {below}")
