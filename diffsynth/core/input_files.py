"""The files that a run reads, each with a digest of samples of its bytes, by which a change is noticed later.

The digests are the identity. Sizes and modification times only tell which files need no second look, because a copy or
a checkout changes times. Weights of 41 GB cost 256 KiB and a header per file.
"""

import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from .json_text import fits, read_json

logger = logging.getLogger(__name__)

PIECE = 4096  # bytes that are read at a place in a file; a disk reads no fewer
PIECES = 64  # places in a file of weights, evenly spread; a guess
HEADER_BYTES = 100_000_000  # the most that the safetensors library accepts
READERS = 8  # threads that read files; a guess
# Suffixes of the files that count in a folder. Python's own table of types has others on other machines.
MEDIA = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".eps", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe"),
    *(".jpeg", ".jpg", ".jxl", ".mpo", ".png", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    *(".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"),
    ".tar",
)
CACHE_INDEX = "index.sqlite"  # it is compared by its samples, because tidying a cache rewrites the file

Record = dict[str, dict[str, Any]]  # what is known of each file of a group, by the file's name
RECORD = {"path": str, "start": int, "size": object, "pieces": int, "status": [int], "folder": bool, "digest": str}


class InputFile(NamedTuple):
    """A file, or a part of one (a member of a tar archive); or a folder, of which the names of its images count.

    Args:
        path: Its path.
        start, size: Where the part begins in the file, and its bytes; a size of None is the whole file.
        pieces, piece: Number of places at which bytes are read, and how many; a file of no more bytes is read whole.
    """

    path: str
    start: int = 0
    size: int | None = None
    pieces: int = PIECES
    piece: int = PIECE


def describe(files: Mapping[str, InputFile]) -> Record:
    """Return size, times and digest of each file that exists, by its name; pipes and devices are left out.

    A file that cannot be read, which a data set may skip, has the digest "unreadable".
    """
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_described, files.values())
        return {name: record for name, record in zip(files, found, strict=True) if record is not None}


def read_records(path: Path) -> dict[str, Record]:
    """Return the records of groups of files in a JSON file; none if it is absent, or damaged, which a warning says."""
    groups = read_json(path)
    if fits(groups, {str: {str: RECORD}}):
        return groups
    logger.warning("%s is damaged and left out: expected a JSON object of groups of files.", path)
    return {}


def digest_of_all(record: Record) -> str:
    """Return one digest (16 hex digits) of all files of a group, which does not depend on their folders and times."""
    digest = blake2b(digest_size=8)
    for name in sorted(name for name, file in record.items() if not file["folder"]):
        digest.update(f"{name}\0{record[name]['digest']}\0".encode(errors="surrogateescape"))
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

    Only files whose size or a time of which has changed are read. A warning names a file that is gone.
    """
    gone = []
    for file in record.values():
        status = _status(file["path"])
        if status is None:
            gone.append(file["path"])
        elif _stamps(status)[: len(file["status"])] != file["status"]:  # until 2026-11-30 without st_ctime
            now = _described(InputFile(**{name: file[name] for name in InputFile._fields if name in file}))
            if now is not None and now["digest"] != file["digest"]:
                what = "the names of its images have changed" if file["folder"] else "it has changed"
                return f"{file['path']}: {what}: its fingerprint was {file['digest']} and is {now['digest']} now"
    if gone:
        logger.warning("%s is gone (%d such files): whether it has changed is not known.", gone[0], len(gone))
    return None


def _stamps(status: os.stat_result) -> list[int]:
    """Size and times of a file, by which one that was rewritten is told; a program can set back all but the last."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _described(file: InputFile) -> dict[str, Any] | None:
    status = _status(file.path)
    is_folder = status is not None and stat.S_ISDIR(status.st_mode)
    if not (is_folder or (status is not None and stat.S_ISREG(status.st_mode))):
        return None
    try:
        digest = _digest_of_folder(file.path) if is_folder else _digest_of_file(file, status.st_size)
    except OSError:
        digest = "unreadable"
    about = {"status": _stamps(status), "folder": is_folder, "digest": digest}
    return {**file._asdict(), **about}


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: the name is invalid, such as one with a null character
        return None


def _digest_of_file(file: InputFile, file_size: int) -> str:
    if os.path.basename(file.path) == CACHE_INDEX:
        return _samples_of_cache(file.path, file_size)
    size = file_size - file.start if file.size is None else file.size
    digest = blake2b(f"{size}\0".encode(), digest_size=8)
    with open(file.path, "rb") as stream:
        for offset, length in _places(file, size, stream):
            stream.seek(file.start + offset)
            digest.update(stream.read(length))
    return digest.hexdigest()


def _places(file: InputFile, size: int, stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield offset and length of what is read of a part of `size` bytes."""
    if size <= file.pieces * file.piece:
        yield 0, max(size, 0)
        return
    if file.path.endswith(".safetensors"):
        yield 0, min(8 + int.from_bytes(stream.read(8), "little"), HEADER_BYTES, size)
    for number in range(file.pieces):
        yield number * (size - file.piece) // (file.pieces - 1), file.piece


def _digest_of_folder(path: str) -> str:
    """Digest of the names of images, videos, tar archives and captions in a folder, not of those below."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    stems = {os.path.splitext(name)[0] for name in names if _is_media(name)}
    counted = [name for name in names if _is_media(name) or (name.endswith(".txt") and name[:-4] in stems)]
    return blake2b("\0".join(sorted(counted)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _is_media(name: str) -> bool:
    return name.lower().endswith(MEDIA)


def _samples_of_cache(index: str, size: int) -> str:
    """Return the hash of a cache's samples, which its index holds; the file's size if that cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{quote(index)}?mode=ro", uri=True)) as database:
            row = database.execute("SELECT value FROM about WHERE name = 'samples'").fetchone()
            return str(row and row[0]).strip('"')
    except sqlite3.Error:
        return f"unreadable, {size} bytes"


def all_in(folder: Path) -> dict[str, InputFile]:
    """Return the files in a folder, such as a tokenizer's, by name; hidden ones, such as locks, are left out."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.name: InputFile(str(file)) for file in files}


def beside(first: Path, files: Iterable[Path]) -> dict[str, InputFile]:
    """Return files by their paths relative to the folder of the first one."""
    return {os.path.relpath(file, first.parent).replace(os.sep, "/"): InputFile(str(file)) for file in files}
