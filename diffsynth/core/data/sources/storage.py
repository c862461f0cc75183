"""Open files wherever they are: on disk, in an object store, inside a tar shard, or in a cell of a table."""

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

from ...regular import require_regular

PART = re.compile(r"(.+\.tar)#(\d+)\+(\d+)/.+")
SAMPLES, SAMPLE = 64, 1 << 12  # pieces of a file that are hashed, and their bytes; guesses
BLOCK = 1 << 20  # bytes per request to an object store; most images, and all headers, need one request; a guess


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddedFile:
    """A file whose content is a cell of a table; its bytes are not read until it is opened.

    Args:
        cell: Binary array of one element, the content.
        name: Name of the file in messages.
    """

    cell: pa.Array
    name: str

    def __reduce__(self) -> tuple:
        # Copied, because the cell is a view of its column and would be pickled with the whole column.
        return EmbeddedFile, (pa.array([self.open().read()], self.cell.type), self.name)

    def __repr__(self) -> str:
        return repr(self.name)

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        # A buffer is a view. An Arrow scalar would copy the whole image, even if only its header is read.
        _, offsets, content = self.cell.buffers()
        width = np.int64 if pa.types.is_large_binary(self.cell.type) else np.int32
        start, end = np.frombuffer(offsets, width)[self.cell.offset :][:2].tolist()
        return io.BufferedReader(FileSlice(pa.BufferReader(content), start, end - start))


class FileSlice(io.RawIOBase):
    """A read-only file of the `size` bytes from `offset` on of an open file; closing it closes that file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        if self.position >= self.size:
            return 0
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: self.size - self.position])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class FollowedFile(io.RawIOBase):
    """A read-only stream of a file, then of `more` bytes."""

    def __init__(self, file: BinaryIO, more: bytes):
        self.parts = [file, io.BytesIO(more)]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:
        return self.parts[0].readinto(buffer) or self.parts[1].readinto(buffer)


def open_file(file: str | EmbeddedFile) -> BinaryIO:
    """Open a path, a URL of an object store (`s3://…`), a part of a tar file (see `part_of`), or an embedded file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The package for such URLs is not installed, or the path is a folder, a pipe or a device.
    """
    if isinstance(file, EmbeddedFile):
        return file.open()
    if part := PART.fullmatch(file):
        return io.BufferedReader(FileSlice(open_file(part[1]), int(part[2]), int(part[3])))
    if is_remote(file):
        return file_system(file).open(file, block_size=BLOCK)
    require_regular(file)
    return open(file, "rb")


def part_of(archive: str, offset: int, size: int, name: str) -> str:
    """A name for a file in a tar archive, with its position, so that `open_file` can read it without a search."""
    return f"{archive}#{offset}+{size}/{os.path.basename(name)}"


def is_part(name: str) -> bool:
    """Whether a name has the form of `part_of`."""
    return PART.fullmatch(name) is not None


def open_parts(value: Any) -> Any:
    """A value in which names of parts of tar files are replaced by open files.

    Foreign code opens paths by `PIL.Image.open`, `numpy.load` or `torch.load`, which also accept open files.
    """
    if isinstance(value, Mapping):
        return {name: open_parts(element) for name, element in value.items()}
    if isinstance(value, list):
        return [open_parts(element) for element in value]
    return open_file(value) if isinstance(value, str) and is_part(value) else value


def is_path(file: str | EmbeddedFile) -> bool:
    """Whether a file is a path of the operating system."""
    return isinstance(file, str) and not is_remote(file) and not is_part(file)


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL; URLs of the same store share one object.

    Raises:
        ValueError: The package for such URLs is not installed, or the protocol is unknown.
    """
    protocol = url.partition("://")[0]
    try:
        # Not fsspec.open or url_to_fs: they follow chains (`a::file://b`), with which metadata could open any file.
        system = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f'{url}: {error}: pip install "fsspec[{protocol}]"') from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; write a path, or a URL such as s3://bucket/folder") from error
    return system(**system._get_kwargs_from_urls(url))


def is_file(path: str) -> bool:
    """Whether a path or URL is an existing file."""
    return file_system(path).isfile(path) if is_remote(path) else os.path.isfile(path)


def size_on_disk(path: str) -> int | None:
    """The size in bytes of a file on this machine; None if it is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: the name is invalid, such as one with a null character
        return None


def absolute(path: str) -> str:
    """The absolute path; URLs stay unchanged."""
    return path if is_remote(path) else os.path.abspath(path)


class StoredFile(NamedTuple):
    """The name and size in bytes of a file, and a `version`: text that changes when its content does."""

    name: str
    size: int
    version: str


def stored(path: str) -> StoredFile:
    """Name, size and version of a file, which is not read.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if is_remote(path):
        return _described(path, file_system(path).info(path))
    status = os.stat(path)
    return StoredFile(path, status.st_size, str(status.st_mtime_ns))


def sampled_digest(path: str, size: int) -> str:
    """A hash (16 hex digits) of the size of a file, its first and last bytes and SAMPLES pieces between.

    For files whose dates and size stay as they were when their content changes, as some copying programs leave them.
    """
    last = max(size - SAMPLE, 0)
    with open_file(path) as file:
        digest = blake2b(str(size).encode(), digest_size=8)
        for number in range(SAMPLES + 1):
            file.seek(last * number // SAMPLES)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def list_files(folder: str) -> Iterator[StoredFile]:
    """The files in a folder and below, except hidden ones; files that differ only in their suffix are neighbours.

    A folder that does not exist has no files: in object stores folders are only parts of names.
    """
    if not is_remote(folder):
        return _walk(folder, "") if os.path.isdir(folder) else iter(())
    system = file_system(folder)
    root = system._strip_protocol(folder).rstrip("/") + "/"
    found = {path.removeprefix(root): info for path, info in system.find(folder, detail=True).items()}
    shown = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
    return (_described(name, found[name]) for name in sorted(shown, key=os.path.splitext))


def _walk(folder: str, below: str) -> Iterator[StoredFile]:
    """The files of `folder` in its subfolder `below`, sorted within each folder, to hold the names of one at a time."""
    with os.scandir(os.path.join(folder, below)) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(shown, key=lambda entry: (entry.is_file(), os.path.splitext(entry.name))):
        name = below + entry.name
        if entry.is_dir():
            yield from _walk(folder, f"{name}/")
        elif entry.is_file():
            yield stored(os.path.join(folder, name))._replace(name=name)


def _described(name: str, info: dict[str, Any]) -> StoredFile:
    # Stores have different fields for dates and hashes; none changes while the file stays the same.
    version = sorted((key, str(value)) for key, value in info.items())
    return StoredFile(name, info["size"], str(version))
