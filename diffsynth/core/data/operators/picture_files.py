"""Opens all pictures, from files and URLs, and shows them as a viewer does: upright, in sRGB, and on white."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ...regular import require_regular
from ..sources.picture_formats import readable_formats, why_unreadable
from ..sources.storage import EmbeddedFile, is_path, open_file
from ..sources.urls import is_url, read_url
from .colours import in_srgb

# Bytes of one text in a PNG, uncompressed: 1 MiB by default, and workflows of ComfyUI are longer; 16 MiB is a guess.
# All texts of a file together may have PngImagePlugin.MAX_TEXT_MEMORY, 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
HASHED = 1 << 22  # bytes that are hashed at a time, as a video may be larger than the memory; a guess


def read_image(file: str | EmbeddedFile, mode: str = "RGB") -> Image.Image:
    """The decoded image of a path, an http(s) URL or an embedded file, as a viewer shows it.

    Raises:
        ValueError: See `open_image`.
        OSError: The file is damaged.
    """
    with open_image(read_url(file) if is_url(file) else file) as image:
        return as_shown(image, mode)


def open_image(file: str | EmbeddedFile | BytesIO) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        ValueError: The file is absent, no image, or of a kind that is refused; says which.
    """
    try:
        source = file if isinstance(file, BytesIO) or is_path(file) else open_file(file)
        if source is file and isinstance(file, str):
            require_regular(file)
        with texts_in_bounds():
            image = Image.open(source, formats=readable_formats())  # Pillow closes only files that it opened itself
    except FileNotFoundError:
        raise not_found(file) from None
    except UnidentifiedImageError:
        raise ValueError(why_unreadable(beginning(source))) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} Save it with fewer pixels") from None
    if image.mode.startswith(("I", "F")):
        image.close()
        # Image.convert clips instead of scaling: a 16-bit depth map would become white.
        raise ValueError(f"has mode {image.mode}, more than 8 bits a channel; save it with 8 bits")
    return image


@contextmanager
def texts_in_bounds() -> Iterator[None]:
    """Say what to do about a PNG that Pillow refuses because of its texts, which can also follow the pixels."""
    try:
        yield
    except ValueError as error:
        if "MAX_TEXT_" not in str(error):
            raise
        limit = PngImagePlugin.MAX_TEXT_CHUNK >> 20
        raise ValueError(f"holds a text of more than {limit} MiB; save it without its metadata") from None


def not_found(file: str) -> ValueError:
    """The error for a file that does not exist."""
    folder, name = os.path.split(file)
    of_windows = os.sep == "/" and "\\" in file
    advice = "; write it relative to the data set's folder, with / instead of \\" if of_windows else ""
    return ValueError(f"not found (looked in {folder or '.'} for {name}){advice}")


def beginning(file: str | BinaryIO) -> bytes:
    """The first 20 bytes of a file that cannot be read; closes the file."""
    with open(file, "rb") if isinstance(file, str) else file as stream:
        stream.seek(0)
        return stream.read(20)


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """The upright image in `mode` and in sRGB; if `mode` has no alpha, on a white background."""
    name = getattr(image, "filename", "") or "a picture"
    with texts_in_bounds():
        return in_mode(in_srgb(ImageOps.exif_transpose(image), name), mode)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`; if `mode` has no alpha, on a white background."""
    if image.has_transparency_data and mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image with its EXIF orientation applied; reads no pixels."""
    exif = Image.Image.getexif(image)  # the method of PngImageFile would decode the image
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def describe_image(image: Image.Image, mode: str) -> list:
    """How an open image is decoded, for the hash of its content; only an ICC profile changes the stored colours."""
    return ["image", mode, "sRGB"] if image.info.get("icc_profile") else ["image", mode]


def describe_file(file: str | EmbeddedFile, description: list) -> list:
    """The hash of a file's bytes, followed by a description of how they are decoded and resized."""
    digest = blake2b(digest_size=16)
    with read_url(file) if is_url(file) else open_file(file) as stream:
        while part := stream.read(HASHED):
            digest.update(part)
    return [digest.hexdigest(), *description]
