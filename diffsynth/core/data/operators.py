"""From a cell of the metadata to a value a pipeline takes: small callables that compose with `>>`.

They are classes rather than closures because DataLoader workers receive them by pickle.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import PurePath
from urllib.request import urlopen

from PIL import Image, ImageOps, UnidentifiedImageError


class Operator:
    """One step; `a >> b` applies `a`, then `b`."""

    def __call__(self, data):
        raise NotImplementedError

    def check(self, data):
        """Raises what the call would raise, as far as headers tell.

        Returns:
            What the next step's `check` takes, None if only the call itself can tell.
        """
        return None

    def __rshift__(self, other: Callable) -> "Chain":
        return Chain(self, other)


class Chain(Operator):
    """Applies `first`, then `second`."""

    def __init__(self, first: Operator, second: Callable):
        self.first, self.second = first, second

    def __call__(self, data):
        return self.second(self.first(data))

    def check(self, data):
        known = self.first.check(data)
        return None if known is None else check(self.second, known)


def check(operator: Callable, data):
    """Checks `data` as `operator` does; of a plain callable nothing is known before it is called."""
    return operator.check(data) if isinstance(operator, Operator) else None


class ToInt(Operator):
    def __call__(self, data) -> int:
        return int(data)

    check = __call__


class ToFloat(Operator):
    def __call__(self, data) -> float:
        return float(data)

    check = __call__


class ToStr(Operator):
    """Text of a value, `none_value` for None."""

    def __init__(self, none_value: str = ""):
        self.none_value = none_value

    def __call__(self, data) -> str:
        return self.none_value if data is None else str(data)

    check = __call__


class ToList(Operator):
    """A list of the one value."""

    def __call__(self, data) -> list:
        return [data]

    check = __call__


class SequentialProcess(Operator):
    """Applies `operator` to every element of a list."""

    def __init__(self, operator: Callable):
        self.operator = operator

    def __call__(self, data: Sequence) -> list:
        return [self.operator(element) for element in data]

    def check(self, data: Sequence):
        known = [check(self.operator, element) for element in data]
        return None if None in known else known


class RouteByType(Operator):
    """Applies the operator of the first (type, operator) pair whose type the value has; type None takes any value."""

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable]]):
        self.operator_map = operator_map

    def __call__(self, data):
        return self.route(data)(data)

    def check(self, data):
        return check(self.route(data), data)

    def route(self, data) -> Callable:
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator
        expected = " or ".join(kind.__name__ for kind, _ in self.operator_map)
        raise ValueError(f"is of type {type(data).__name__}, expected {expected}")


class ToAbsolutePath(Operator):
    """Path of a file named relative to `base_path`; http(s) URLs stay as they are.

    Metadata is data from elsewhere: a name may not lead out of `base_path`. Links inside it are followed, since
    the caches of model hubs consist of them.
    """

    def __init__(self, base_path: str = ""):
        self.base_path = base_path

    def __call__(self, data: str) -> str:
        if is_url(data):
            return data
        path = PurePath(os.path.normpath(data))
        if path.anchor or path.parts[:1] == ("..",):
            raise ValueError(f"leads out of {self.base_path or 'the working folder'}; write it relative to that folder")
        return os.path.join(self.base_path, path)

    check = __call__


class LoadImage(Operator):
    """Image of a path or http(s) URL, upright (EXIF orientation applied), as `mode` ("RGB", "RGBA", ...)."""

    def __init__(self, mode: str = "RGB"):
        self.mode = mode

    def __call__(self, data: str) -> Image.Image:
        with open_image(read_url(data) if is_url(data) else data) as image:
            return ImageOps.exif_transpose(image).convert(self.mode)

    def check(self, data: str) -> tuple[int, int] | None:
        """(width, height) as stored, read from the header; None for a URL, which is fetched only when it is used."""
        if is_url(data):
            return None
        with open_image(data) as image:
            return image.size


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
        if height is not None:
            require_multiple("height", height, height_division_factor)
            require_multiple("width", width, width_division_factor)

    def __call__(self, data: Image.Image) -> Image.Image:
        width, height = self.target_size(*data.size)
        scale = max(width / data.width, height / data.height)
        image = data.resize((round(data.width * scale), round(data.height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def check(self, data: tuple[int, int]) -> tuple[int, int]:
        return self.target_size(*data)

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


def require_multiple(name: str, value: int, factor: int) -> None:
    if value < factor or value % factor:
        below = max(value // factor, 1) * factor
        raise ValueError(f"{name}={value} is not a multiple of {name}_division_factor={factor}: use {below}")


def is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def read_url(url: str) -> BytesIO:
    """Contents of a URL: 3 tries of 30 s, after waits of 1 s and 2 s."""
    for wait in (1, 2, None):
        try:
            with urlopen(url, timeout=30) as response:
                return BytesIO(response.read())
        except (OSError, HTTPException) as error:
            if wait is None:
                raise ValueError(f"could not be fetched in 3 tries: {error}") from error
            time.sleep(wait)


def open_image(file: str | BytesIO) -> Image.Image:
    """Opens an image without decoding it."""
    try:
        image = Image.open(file)
    except FileNotFoundError:
        folder, name = os.path.split(file)
        raise ValueError(f"not found (looked in {folder or '.'} for {name})") from None
    except UnidentifiedImageError:
        raise ValueError("is not an image that Pillow can read") from None
    if image.mode.startswith(("I", "F")):
        image.close()
        # Image.convert clips instead of scaling: a 16-bit depth map would turn white.
        raise ValueError(f"has mode {image.mode}, more than 8 bits a channel; save it with 8 bits")
    return image
