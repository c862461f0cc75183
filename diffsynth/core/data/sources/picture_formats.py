"""Formats of pictures: which ones Pillow and its plug-ins read here, and the suffixes of their files."""

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

from PIL import Image

PROGRAMS = {"EPS", "WMF"}  # Pillow draws them with Ghostscript, or with the graphics of Windows
HEADERS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows only how they begin
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".ts")


class PlugIn(NamedTuple):
    """A package that teaches Pillow a format.

    Args:
        format: Name of the format in messages.
        package: What to install.
        module: What to import.
        suffixes: Suffixes of the format's files.
        start: Matches the first bytes of a file.
        register: Name of a function of the module that registers the format; None if the import does so.
    """

    format: str
    package: str
    module: str
    suffixes: tuple[str, ...]
    start: re.Pattern
    register: str | None = None

    def load(self) -> bool:
        """Import the package, unless Pillow reads the format already; return whether it is readable."""
        if not self.readable:
            try:
                module = import_module(self.module)
            except ImportError:
                return False
            register: Callable = getattr(module, self.register) if self.register else list
            register()
        return self.readable

    @property
    def readable(self) -> bool:
        return Image.EXTENSION.get(self.suffixes[0]) in Image.OPEN


PLUG_INS = (
    PlugIn(
        "HEIC",
        "pillow-heif",
        "pillow_heif",
        (".heic", ".heif", ".hif"),
        re.compile(rb"(?s)....ftyp(hei|hev|mif|msf)"),
        "register_heif_opener",
    ),
    PlugIn("JPEG XL", "pillow-jxl-plugin", "pillow_jxl", (".jxl",), re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    PlugIn(
        "AVIF",
        '"pillow>=11.3" or pillow-avif-plugin',
        "pillow_avif",
        (".avif", ".avifs"),
        re.compile(rb"(?s)....ftypavi"),
    ),
)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here without starting another program."""
    Image.init()
    for plug_in in PLUG_INS:
        plug_in.load()
    return tuple(name for name in Image.ID if name not in PROGRAMS | HEADERS)


@cache
def picture_suffixes() -> tuple[str, ...]:
    """The suffixes, in lower case, of files that are pictures, those included that cannot be read here."""
    Image.init()
    known = (Image.OPEN.keys() | {"MPO"}) - HEADERS  # Pillow opens MPO as JPEG
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in known}
    return tuple(sorted(suffixes.union(*(plug_in.suffixes for plug_in in PLUG_INS))))


def suffixes_of(column: str) -> tuple[str, ...]:
    """The suffixes, in lower case, of the files of a column `image` or `video`; a picture is a video of one frame."""
    return picture_suffixes() + (VIDEO_SUFFIXES if column == "video" else ())


def why_unreadable(start: bytes) -> str:
    """Why Pillow cannot read a file that begins with these (20) bytes."""
    if start.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "is PostScript, which is a program; save it as PNG"
    for plug_in in PLUG_INS:
        if plug_in.start.match(start) and not plug_in.readable:
            return (
                f"is {plug_in.format}, which Pillow cannot read here: pip install {plug_in.package}, or save it as PNG"
            )
    return f"is not an image that Pillow can read; {how_it_begins(start)}"


def how_it_begins(start: bytes) -> str:
    """The first bytes of a file (of a web page, say, or a Git LFS pointer) for messages."""
    return f"it begins with {start!r}" if start else "it is empty"
