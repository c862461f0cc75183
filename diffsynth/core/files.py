"""Write files and folders atomically: after a crash they are complete or absent. Append to logs that lose no line."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from .json_text import read_lines, to_json
from .process.locks import LOCK, is_held, machine, started
from .regular import require_regular

logger = logging.getLogger(__name__)

ON_WINDOWS = os.name == "nt"
MADE = ".made-by-diffsynth"  # a file in folders that this program has made and may replace
PARTIAL = re.compile(r"\.partial-(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)|\d+)-")  # older versions left the machine out
SLACK = 60  # seconds by which the clocks of a machine and of its file server may differ; a guess
# Errors of file systems that cannot sync a folder (VirtualBox, CIFS, some FUSE); PostgreSQL's `fsync_fname` passes over
# EINVAL and EBADF as well. A disk that fails has others: EIO, ENOSPC.
CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
OF_THE_DISK = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, and move it to `path`, on disk, when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with _named(path):
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, and move it to `path`, with its files on disk, when the block ends without an error."""
    path = Path(path)
    partial = partial_path(path)
    partial.mkdir(parents=True)
    try:
        with _named(path):
            yield partial
            for file in partial.rglob("*"):
                _sync(file)
            _sync(partial)
            _replace_folder(partial, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Move a folder to the place of another, which is moved aside first: deleted halfway, it would be neither."""
    old = partial_path(path.with_name(f"old-{path.name}"))
    if path.is_dir():
        path.replace(old)
    try:
        new.replace(path)
    except OSError:
        if old.exists():
            old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, an error of the disk names `path`; those of `write` and `fsync` name no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_replaceable(folder: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Check that this folder may be replaced or filled: it is empty but for its lock, or was marked by `mark_as_made`.

    Args:
        inputs: Files and folders that the run reads.

    Raises:
        ValueError: It holds other files, or an input.
    """
    folder = Path(folder).resolve()
    for path in map(Path, inputs):
        if path.resolve().is_relative_to(folder):
            raise ValueError(f"{folder} would be replaced, but {path} in it is read; set another output=….")
    if folder.exists() and not was_made(folder) and any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that this program has not made; expected a new or an empty folder: set another "
            "output=…."
        )


def mark_as_made(folder: Path) -> None:
    """Note in a folder that this program has made it, so that it may replace it."""
    (folder / MADE).touch()


def was_made(folder: Path) -> bool:
    """Whether `mark_as_made` marked a folder."""
    return (folder / MADE).exists()


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files and folders that killed processes left in `folder` and below.

    Those of a living process stay, and so does all that is in a folder below which has a lock of its own, or has a name
    that `partial_path` does not give. A process of another machine counts as living unless this process holds the lock
    of `folder`.
    """
    folder = Path(folder)
    for partial in list(folder.rglob(".partial-*")):
        below = partial.relative_to(folder).parents[:-1]
        named = PARTIAL.match(partial.name)
        if named is None or _is_being_written(partial, named) or any((folder / path / LOCK).exists() for path in below):
            continue
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)  # it may have been in a temporary folder that is deleted already


def _is_being_written(partial: Path, named: re.Match) -> bool:
    """Whether the process that is named by a temporary file or folder may still write it."""
    if named["pid"] is None or int(named["pid"]) == os.getpid():
        return False
    if named["machine"] != machine():
        return not is_held(partial.parent)
    since = started(int(named["pid"]))
    try:
        return since is not None and since <= partial.lstat().st_mtime + SLACK  # else it is a later one
    except FileNotFoundError:  # it has just been moved to its place
        return False


def write_text(path: str | Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        errors: How bytes in file names that are no UTF-8 are written, as `str.encode` spells it: as escapes, which JSON
            has too, or with `surrogateescape` as they were.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def append_text(path: str | Path, text: str) -> None:
    """Append to a text file, or raise an OSError and leave it as it was."""
    if os.path.exists(path):
        require_regular(path)
    with Path(path).open("ab", buffering=0) as file:
        size, left = file.seek(0, os.SEEK_END), memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def going_on_without(path: str | Path) -> Iterator[None]:
    """Inside, write a file that a run can do without: if the disk is full or fails, a warning names it.

    The program goes on, and the caller tries again when it writes the next time.
    """
    try:
        yield
    except OSError as error:
        logger.warning("%s is not written, and the run goes on without it: %s", path, error)


def check_writable(folder: str | Path, key: str) -> None:
    """Check that a folder takes files, or can be made.

    Args:
        key: The setting that names the folder, for the error message.

    Raises:
        ValueError: It does not, or cannot.
    """
    path = Path(folder).absolute()
    # Of a drive that Windows does not have, nothing exists.
    nearest = next((each for each in (path, *path.parents) if each.exists()), Path(path.anchor))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{key} is {folder}, but {nearest} is no folder that can be written to; set {key}=… to one.")


def digest_of(path: str | Path) -> str:
    """32 hex digits of a file's bytes."""
    digest = blake2b(digest_size=16)
    require_regular(path)
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def forget_after(path: str | Path, step: int) -> None:
    """Delete lines of later steps, and lines that cannot be read, from a JSON lines file whose lines have a `step`."""
    path = Path(path)
    if path.exists():
        kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and line["step"] <= step]
        write_text(path, "".join(to_json(line) + "\n" for line in kept))


def forget_at(path: str | Path, step: int, name: str) -> None:
    """Delete the lines of a step that have the key `name` from a JSON lines file whose lines have a `step`."""
    path = Path(path)
    if path.exists():
        kept = [line for line in read_lines(path) if line.get("step") != step or name not in line]
        write_text(path, "".join(to_json(line) + "\n" for line in kept))


def partial_path(path: Path) -> Path:
    """Return the temporary name for `path` that tells `remove_leftovers` which process writes it."""
    return path.with_name(f".partial-{machine()}-{os.getpid()}-{path.name}")


def _sync(path: Path) -> None:
    """Sync a file to disk, or the names in a folder where the file system can.

    Windows can neither open a folder nor sync what is read-only.
    """
    is_folder = path.is_dir()
    if ON_WINDOWS and is_folder:
        return
    descriptor = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in CANNOT_SYNC_FOLDERS):
            raise
    finally:
        os.close(descriptor)
