"""The files that a run reads, each with a digest of samples of its bytes, by which a change is noticed later.

The digests are the identity. Sizes and modification times only tell which files need no second look, because a copy or
a checkout changes times. Weights of 41 GB cost 256 KiB and a header per file.
"""

import mimetypes
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

PIECE = 4096  # bytes that are read at a place in a file; a disk reads no fewer
PIECES = 64  # places in a file of weights, evenly spread; a guess
HEADER_BYTES = 100_000_000  # the most that the safetensors library accepts
READERS = 8  # threads that read files; a guess
CACHE_INDEX = "index.sqlite"  # it is compared by its samples, because tidying a cache rewrites the file

Record = dict[str, dict[str, Any]]  # what is known of each file of a group, by the file's name


class InputFile(NamedTuple):
    """A file, or a part of one (a member of a tar archive); or a folder, of which the names of its images count.

    Args:
        path: Its path.
        start, size: Where the part begins in the file, and its bytes; a size of None is the whole file.
        pieces: Number of places at which `PIECE` bytes are read; a file of no more bytes is read whole.
    """

    path: str
    start: int = 0
    size: int | None = None
    pieces: int = PIECES


def describe(files: Mapping[str, InputFile]) -> Record:
    """Return size, modification time and digest of each file that exists, by its name."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_described, files.values())
        return {name: record for name, record in zip(files, found, strict=True) if record is not None}


def digest_of_all(record: Record) -> str:
    """Return one digest (16 hex digits) of all files of a group, which does not depend on their folders and times."""
    digest = blake2b(digest_size=8)
    for name in sorted(name for name, file in record.items() if not file["folder"]):
        digest.update(f"{name}\0{record[name]['digest']}\0".encode())
    return digest.hexdigest()


def first_difference(before: Record, now: Record) -> str | None:
    """Return which file of a group differs between two records, and how; None if none does."""
    for name in sorted(before.keys() | now.keys()):
        old, new = (record.get(name, {"digest": None, "folder": False}) for record in (before, now))
        if old["digest"] != new["digest"] and not (old["folder"] or new["folder"]):
            return f"{name}: its fingerprint was {old['digest'] or 'absent'} and is {new['digest'] or 'absent'} now"
    return None


def changed(record: Record) -> str | None:
    """Return which recorded file has changed on disk since, and how; None if none has, as far as the files are there.

    Only files whose size or modification time has changed are read.
    """
    for file in record.values():
        status = _status(file["path"])
        if status is not None and [status.st_size, status.st_mtime_ns] != file["status"]:
            now = _described(InputFile(*(file[name] for name in InputFile._fields)))
            if now is not None and now["digest"] != file["digest"]:
                what = "the names of its images have changed" if file["folder"] else "it has changed"
                return f"{file['path']}: {what}: its fingerprint was {file['digest']} and is {now['digest']} now"
    return None


def _described(file: InputFile) -> dict[str, Any] | None:
    status = _status(file.path)
    if status is None:
        return None
    is_folder = os.path.isdir(file.path)
    digest = _digest_of_folder(file.path) if is_folder else _digest_of_file(file, status.st_size)
    about = {"status": [status.st_size, status.st_mtime_ns], "folder": is_folder, "digest": digest}
    return {**file._asdict(), **about}


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: the name is invalid, such as one with a null character
        return None


def _digest_of_file(file: InputFile, file_size: int) -> str:
    if os.path.basename(file.path) == CACHE_INDEX:
        return _samples_of_cache(file.path)
    size = file_size - file.start if file.size is None else file.size
    digest = blake2b(f"{size}\0".encode(), digest_size=8)
    with open(file.path, "rb") as stream:
        for offset, length in _places(file, size, stream):
            stream.seek(file.start + offset)
            digest.update(stream.read(length))
    return digest.hexdigest()


def _places(file: InputFile, size: int, stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield offset and length of what is read of a part of `size` bytes."""
    if size <= file.pieces * PIECE:
        yield 0, max(size, 0)
        return
    if file.path.endswith(".safetensors"):
        yield 0, min(8 + int.from_bytes(stream.read(8), "little"), HEADER_BYTES, size)
    for number in range(file.pieces):
        yield number * (size - PIECE) // (file.pieces - 1), PIECE


def _digest_of_folder(path: str) -> str:
    """Digest of the names of images, videos, tar archives and captions in a folder, not of those below."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    stems = {os.path.splitext(name)[0] for name in names if _is_media(name)}
    counted = [name for name in names if _is_media(name) or (name.endswith(".txt") and name[:-4] in stems)]
    return blake2b("\0".join(sorted(counted)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _is_media(name: str) -> bool:
    kind = mimetypes.guess_type(name)[0] or ""
    return kind.startswith(("image/", "video/")) or kind == "application/x-tar"


def _samples_of_cache(index: str) -> str:
    """Return the hash of a cache's samples, which its index holds; that of the file's size if it cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{quote(index)}?mode=ro", uri=True)) as database:
            row = database.execute("SELECT value FROM about WHERE name = 'samples'").fetchone()
            return str(row and row[0]).strip('"')
    except sqlite3.Error as error:
        return f"unreadable: {error}"


def all_in(folder: Path) -> dict[str, InputFile]:
    """Return the files in a folder, such as a tokenizer's, by name; hidden ones, such as locks, are left out."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.name: InputFile(str(file)) for file in files}


def beside(first: Path, files: Iterable[Path]) -> dict[str, InputFile]:
    """Return files by their paths relative to the folder of the first one."""
    return {os.path.relpath(file, first.parent).replace(os.sep, "/"): InputFile(str(file)) for file in files}
