"""How long each frame of an animation is shown, read from its file without decoding it."""

import struct
from collections.abc import Iterator
from typing import BinaryIO

EXTENSION, IMAGE, CONTROL = 0x21, 0x2C, 0xF9  # bytes that begin a block of a GIF, and name its graphic control


def durations(file: BinaryIO, kind: str) -> list[float]:
    """The duration of each frame in milliseconds, as it is stored; empty for a kind that is not known here.

    Args:
        file: The file, which is read from its beginning.
        kind: Pillow's name of its format.

    Raises:
        struct.error: It is cut off.
    """
    reader = {"GIF": of_gif, "WEBP": of_webp, "PNG": of_png}.get(kind)
    file.seek(0)
    return list(reader(file)) if reader else []


def of_gif(file: BinaryIO) -> Iterator[float]:
    """See "Graphics Interchange Format, Version 89a" (CompuServe 1990); delays are in hundredths of a second."""
    header, delay = file.read(13), 0
    file.seek(table_bytes(header[10]), 1)
    while (kind := unpack("<B", file)[0]) in (EXTENSION, IMAGE):
        if kind == IMAGE:
            flags = file.read(9)[8]
            file.seek(table_bytes(flags) + 1, 1)
            yield 10 * delay
            delay = 0
        elif unpack("<B", file)[0] == CONTROL:
            _, _, delay = unpack("<BBH", file)
            file.seek(1, 1)
        while size := unpack("<B", file)[0]:
            file.seek(size, 1)


def table_bytes(flags: int) -> int:
    """Bytes of the colour table that follows, if the flags announce one."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def of_webp(file: BinaryIO) -> Iterator[float]:
    """See RFC 9649, section 2.7.1.1; a frame's duration has 24 bits."""
    file.seek(12)
    while header := file.read(8):
        name, size = struct.unpack("<4sI", header)
        end = file.tell() + size + size % 2
        if name == b"ANMF":
            yield int.from_bytes(file.read(16)[12:15], "little")
        file.seek(end)


def of_png(file: BinaryIO) -> Iterator[float]:
    """See "Portable Network Graphics (PNG) Specification (Third Edition)", section 11.3.6.1."""
    file.seek(8)
    while header := file.read(8):
        size, name = struct.unpack(">I4s", header)
        end = file.tell() + size + 4
        if name == b"fcTL":
            numerator, denominator = struct.unpack(">HH", file.read(24)[20:])
            yield 1000 * numerator / (denominator or 100)
        file.seek(end)


def unpack(form: str, file: BinaryIO) -> tuple:
    """The numbers at the position of a file."""
    return struct.unpack(form, file.read(struct.calcsize(form)))
