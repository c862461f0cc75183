"""Open image files and URLs, and show them as a viewer does: upright, and on white."""

import os
import time
from hashlib import blake2b
from http.client import HTTPException
from io import BytesIO
from typing import BinaryIO
from urllib.request import urlopen

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..sources.storage import EmbeddedFile, is_path, open_file


def is_url(path: str | EmbeddedFile) -> bool:
    """Whether a file name is an http(s) URL."""
    return isinstance(path, str) and path.startswith(("http://", "https://"))


def read_url(url: str) -> BytesIO:
    """Download a URL; up to 3 tries of 30 s, 1 s and 2 s apart (guesses)."""
    for wait in (1, 2, None):
        try:
            with urlopen(url, timeout=30) as response:
                return BytesIO(response.read())
        except (OSError, HTTPException) as error:
            if wait is None:
                raise ValueError(f"could not be fetched in 3 tries: {error}") from error
            time.sleep(wait)


def open_image(file: str | EmbeddedFile | BytesIO) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        ValueError: The file is absent, no image, or of a kind that is refused; says which.
    """
    try:
        source = file if isinstance(file, BytesIO) or is_path(file) else open_file(file)
        image = Image.open(source)  # Pillow closes only files that it opened itself, so it gets paths
    except FileNotFoundError:
        raise not_found(file) from None
    except UnidentifiedImageError:
        raise ValueError(f"is not an image that Pillow can read; {beginning(source)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} Save it with fewer pixels") from None
    if image.format == "EPS":
        image.close()
        # Pillow would run it with Ghostscript.
        raise ValueError("is PostScript, which is a program; save it as PNG")
    if image.mode.startswith(("I", "F")):
        image.close()
        # Image.convert clips instead of scaling: a 16-bit depth map would become white.
        raise ValueError(f"has mode {image.mode}, more than 8 bits a channel; save it with 8 bits")
    return image


def not_found(file: str) -> ValueError:
    """The error for a file that does not exist."""
    folder, name = os.path.split(file)
    return ValueError(f"not found (looked in {folder or '.'} for {name})")


def beginning(file: str | BinaryIO) -> str:
    """How an unreadable file begins (a web page, say, or a Git LFS pointer), for messages; closes the file."""
    with open(file, "rb") if isinstance(file, str) else file as stream:
        stream.seek(0)
        start = stream.read(20)
    return f"it begins with {start!r}" if start else "it is empty"


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """The upright image in `mode`; if `mode` has no alpha, on a white background."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image with its EXIF orientation applied; reads no pixels."""
    exif = Image.Image.getexif(image)  # the method of PngImageFile would decode the image
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def describe_file(file: str | EmbeddedFile, description: list) -> list:
    """The hash of a file's bytes, followed by a description of how they are decoded and resized."""
    with read_url(file) if is_url(file) else open_file(file) as stream:
        return [blake2b(stream.read(), digest_size=16).hexdigest(), *description]
