"""Where the bytes of a file are: on a disk, in an object store, inside a tar shard, or in the table that names it."""

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PART = re.compile(r"(.+\.tar)#(\d+)\+(\d+)/.+")
BLOCK = 1 << 20  # of one request to an object store: most images are one, and headers no more than one


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddedFile:
    """A file whose content is a cell of a table; nothing of it is read before it is opened.

    Args:
        cell: Binary array of that one element.
        name: What to call it in messages.
    """

    cell: pa.Array
    name: str

    def __reduce__(self):
        # By itself: the cell is a view of its column, and would take all of that along.
        return EmbeddedFile, (pa.array([self.open().read()], self.cell.type), self.name)

    def __repr__(self) -> str:
        return repr(self.name)

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        # Arrow copies what it makes a scalar of, all of an image where only its header is wanted; a buffer is a view.
        _, offsets, content = self.cell.buffers()
        width = np.int64 if pa.types.is_large_binary(self.cell.type) else np.int32
        start, end = np.frombuffer(offsets, width)[self.cell.offset :][:2].tolist()
        return io.BufferedReader(FileSlice(pa.BufferReader(content), start, end - start))


class FileSlice(io.RawIOBase):
    """`size` bytes of an open file, from `offset` on; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        if self.position >= self.size:
            return 0
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: self.size - self.position])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_file(file: str | EmbeddedFile) -> BinaryIO:
    """Opens a path, a URL of an object store (`s3://…`), a part of a tar file that `part_of` names, or a cell.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The package for such URLs is not installed; names the command that installs it.
    """
    if isinstance(file, EmbeddedFile):
        return file.open()
    if part := PART.fullmatch(file):
        return io.BufferedReader(FileSlice(open_file(part[1]), int(part[2]), int(part[3])))
    return file_system(file).open(file, block_size=BLOCK) if is_remote(file) else open(file, "rb")


def part_of(archive: str, offset: int, size: int, name: str) -> str:
    """Name of a file in a tar file by which `open_file` finds it without a search; it ends as the file's own does."""
    return f"{archive}#{offset}+{size}/{os.path.basename(name)}"


def is_part(name: str) -> bool:
    """Whether a name is one that `part_of` makes."""
    return PART.fullmatch(name) is not None


def open_parts(value: Any) -> Any:
    """A value in which the names of parts of tar files are replaced by open files.

    For code from elsewhere, which opens what it is given as a path: `PIL.Image.open`, `numpy.load` and `torch.load`
    take an open file as they take a path.
    """
    if isinstance(value, Mapping):
        return {name: open_parts(element) for name, element in value.items()}
    if isinstance(value, list):
        return [open_parts(element) for element in value]
    return open_file(value) if isinstance(value, str) and is_part(value) else value


def is_path(file: str | EmbeddedFile) -> bool:
    """Whether a name is one that the operating system knows."""
    return isinstance(file, str) and not is_remote(file) and not is_part(file)


def is_remote(path: str) -> bool:
    return "://" in path


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL, one object for all URLs of a store.

    Raises:
        ValueError: The package for such URLs is not installed, or there is none.
    """
    protocol = url.partition("://")[0]
    try:
        # Not fsspec.open or url_to_fs: they follow chains (`a::file://b`), by which metadata could lead anywhere.
        system = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f'{url}: {error}: pip install "fsspec[{protocol}]"') from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; write a path, or a URL such as s3://bucket/folder") from error
    return system(**system._get_kwargs_from_urls(url))


def is_file(path: str) -> bool:
    return file_system(path).isfile(path) if is_remote(path) else os.path.isfile(path)


def size_on_disk(path: str) -> int | None:
    """Bytes of a file of this machine; None of what is not one."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


class StoredFile(NamedTuple):
    """A file in a folder: `version` is text that changes when its content does."""

    name: str
    size: int
    version: str


def stored(path: str) -> StoredFile:
    """What is known of a file without reading it.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if is_remote(path):
        return _described(path, file_system(path).info(path))
    status = os.stat(path)
    return StoredFile(path, status.st_size, str(status.st_mtime_ns))


def list_files(folder: str) -> Iterator[StoredFile]:
    """The files in a folder and below, hidden ones aside; those that differ only in their suffix follow one another.

    A folder that is not there has none, as in an object store, where folders are but parts of names.
    """
    if not is_remote(folder):
        return _walk(folder, "") if os.path.isdir(folder) else iter(())
    system = file_system(folder)
    root = system._strip_protocol(folder).rstrip("/") + "/"
    found = ((path.removeprefix(root), about) for path, about in system.find(folder, detail=True).items())
    shown = ((name, about) for name, about in found if not any(part.startswith(".") for part in name.split("/")))
    return (_described(name, about) for name, about in sorted(shown, key=lambda item: os.path.splitext(item[0])))


def _walk(folder: str, below: str) -> Iterator[StoredFile]:
    """Sorted folder by folder, so that no more than the names of one folder are held at a time."""
    with os.scandir(os.path.join(folder, below)) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(shown, key=lambda entry: (entry.is_file(), os.path.splitext(entry.name))):
        name = below + entry.name
        if entry.is_dir():
            yield from _walk(folder, f"{name}/")
        elif entry.is_file():
            yield stored(os.path.join(folder, name))._replace(name=name)


def _described(name: str, about: dict[str, Any]) -> StoredFile:
    # Stores date and mark content each in its own way; none of it changes while the file does not.
    return StoredFile(name, about["size"], str(sorted((key, str(value)) for key, value in about.items())))
