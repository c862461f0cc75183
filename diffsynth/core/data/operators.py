"""From a cell of the metadata to a value a pipeline takes: small callables that compose with `>>`.

They are classes rather than closures because DataLoader workers receive them by pickle.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from http.client import HTTPException
from io import BytesIO
from itertools import chain
from pathlib import PurePath
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import urlopen

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .storage import EmbeddedFile, is_path, open_file
from .unread import Unread


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

    def unread(self, data):
        """What the call would return, with files in it `Unread`.

        Raises:
            TypeError: The operator cannot say so before it is called.
        """
        raise TypeError(f"{type(self).__name__} cannot tell what it makes without making it; it has no unread()")

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

    def unread(self, data):
        return unread(self.second, self.first.unread(data))


def check(operator: Callable, data):
    """Checks `data` as `operator` does; of a plain callable nothing is known before it is called."""
    return operator.check(data) if isinstance(operator, Operator) else None


def unread(operator: Callable, data):
    """What `operator` would return, with files in it `Unread`."""
    if not isinstance(operator, Operator):
        raise TypeError(f"{operator!r} is no Operator, and cannot tell what it makes without making it")
    return operator.unread(data)


class ToInt(Operator):
    def __call__(self, data) -> int:
        return int(data)

    check = unread = __call__


class ToFloat(Operator):
    def __call__(self, data) -> float:
        return float(data)

    check = unread = __call__


class ToStr(Operator):
    """Text of a value, `none_value` for None."""

    def __init__(self, none_value: str = ""):
        self.none_value = none_value

    def __call__(self, data) -> str:
        return self.none_value if data is None else str(data)

    check = unread = __call__


class ToList(Operator):
    """A list of the one value."""

    def __call__(self, data) -> list:
        return [data]

    check = unread = __call__


class SequentialProcess(Operator):
    """Applies `operator` to every element of a list."""

    def __init__(self, operator: Callable):
        self.operator = operator

    def __call__(self, data: Sequence) -> list:
        return apply_to_each(self.operator, data)

    def check(self, data: Sequence):
        known = apply_to_each(partial(check, self.operator), data)
        return None if None in known else known

    def unread(self, data: Sequence) -> list:
        return apply_to_each(partial(unread, self.operator), data)


def apply_to_each(function: Callable, elements: Sequence) -> list:
    """Results of `function`, whose errors name the element."""
    results = []
    for element in elements:
        try:
            results.append(function(element))
        except Exception as error:  # Pillow's decoders raise nearly anything
            raise ValueError(f"{element!r}: {error}") from error
    return results


class Route(Operator):
    """Applies the operator that `route` chooses for a value."""

    def __call__(self, data):
        return self.route(data)(data)

    def check(self, data):
        return check(self.route(data), data)

    def unread(self, data):
        return unread(self.route(data), data)

    def route(self, data) -> Callable:
        raise NotImplementedError


class RouteByType(Route):
    """Applies the operator of the first (type, operator) pair whose type the value has; type None takes any value."""

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable]]):
        self.operator_map = operator_map

    def route(self, data) -> Callable:
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator
        expected = " or ".join(kind.__name__ for kind, _ in self.operator_map)
        raise ValueError(f"is of type {type(data).__name__}, expected {expected}")


class RouteByExtensionName(Route):
    """Applies the operator of the first (extensions, operator) pair that has the extension of a path or URL.

    Extensions are lower case without a dot, as in `("jpg", "png")`; None takes any.
    """

    def __init__(self, operator_map: Sequence[tuple[Sequence[str] | None, Callable]]):
        self.operator_map = operator_map

    def route(self, data: str | EmbeddedFile) -> Callable:
        path = urlsplit(data).path if is_url(data) else str(data)
        extension = PurePath(path).suffix.lower().removeprefix(".")
        for extensions, operator in self.operator_map:
            if extensions is None or extension in extensions:
                return operator
        expected = ", ".join(chain.from_iterable(extensions for extensions, _ in self.operator_map))
        raise ValueError(f"has the extension {extension!r}, expected one of {expected}")


class ToAbsolutePath(Operator):
    """Path of a file named relative to `base_path`; http(s) URLs and embedded files stay as they are.

    Metadata is data from elsewhere: a name may not lead out of `base_path`. Links inside it are followed, since
    the caches of model hubs consist of them.
    """

    def __init__(self, base_path: str = ""):
        self.base_path = base_path

    def __call__(self, data: str | EmbeddedFile) -> str | EmbeddedFile:
        if isinstance(data, EmbeddedFile) or is_url(data):
            return data
        path = PurePath(os.path.normpath(data))
        if path.anchor or path.parts[:1] == ("..",):
            raise ValueError(f"leads out of {self.base_path or 'the working folder'}; write it relative to that folder")
        return os.path.join(self.base_path, path)

    check = unread = __call__


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


def is_url(path: str | EmbeddedFile) -> bool:
    return isinstance(path, str) and path.startswith(("http://", "https://"))


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


def open_image(file: str | EmbeddedFile | BytesIO) -> Image.Image:
    """Opens an image without decoding it."""
    try:
        source = file if isinstance(file, BytesIO) or is_path(file) else open_file(file)
        image = Image.open(source)  # which closes what it opened itself: paths are left to it
    except FileNotFoundError:
        raise not_found(file) from None
    except UnidentifiedImageError:
        raise ValueError(f"is not an image that Pillow can read; {beginning(source)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} Save it with fewer pixels") from None
    if image.format == "EPS":
        image.close()
        # Pillow would have Ghostscript run it.
        raise ValueError("is PostScript, which is a program; save it as PNG")
    if image.mode.startswith(("I", "F")):
        image.close()
        # Image.convert clips instead of scaling: a 16-bit depth map would turn white.
        raise ValueError(f"has mode {image.mode}, more than 8 bits a channel; save it with 8 bits")
    return image


def not_found(file: str) -> ValueError:
    folder, name = os.path.split(file)
    return ValueError(f"not found (looked in {folder or '.'} for {name})")


def beginning(file: str | BinaryIO) -> str:
    """What a file that cannot be read holds instead, such as a web page or a pointer of Git LFS; closes it."""
    with open(file, "rb") if isinstance(file, str) else file as stream:
        stream.seek(0)
        start = stream.read(20)
    return f"it begins with {start!r}" if start else "it is empty"


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """An image upright as `mode`, on white where `mode` cannot show that it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image as it is shown, its EXIF orientation applied; reads no pixel."""
    exif = Image.Image.getexif(image)  # a PNG's own method would decode the image first
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def describe_file(file: str | EmbeddedFile, description: list) -> list:
    """A digest of a file's bytes, and a description of what is done to them."""
    with read_url(file) if is_url(file) else open_file(file) as stream:
        return [blake2b(stream.read(), digest_size=16).hexdigest(), *description]
