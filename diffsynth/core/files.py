"""Write files and folders atomically: after a crash they are complete or absent."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

ON_WINDOWS = os.name == "nt"
MADE = ".made-by-diffsynth"  # a file in folders that this program has made and may replace


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, and move it to `path`, on disk, when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
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
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Check that `replacing_folder` may replace this folder: it is empty, or was marked by `mark_as_made`.

    Args:
        inputs: Files and folders that the run reads.

    Raises:
        ValueError: It holds other files, or an input.
    """
    folder = Path(folder).resolve()
    for path in map(Path, inputs):
        if path.resolve().is_relative_to(folder):
            raise ValueError(f"{folder} would be replaced, but {path} in it is read; set another output=….")
    if folder.exists() and not (folder / MADE).exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that this program has not made, and would be replaced; expected a new or an empty "
            "folder: set another output=…."
        )


def mark_as_made(folder: Path) -> None:
    """Note in a folder that this program has made it, so that it may replace it."""
    (folder / MADE).touch()


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files and folders that killed processes left in `folder` and below."""
    for partial in list(Path(folder).rglob(".partial-*")):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)  # it may have been in a temporary folder that is deleted already


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(folder: str | Path, key: str) -> None:
    """Check that a folder takes files, or can be made.

    Args:
        key: The setting that names the folder, for the error message.

    Raises:
        ValueError: It does not, or cannot.
    """
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{key} is {folder}, but {nearest} is no folder that can be written to; set {key}=… to one.")


def digest_of(path: str | Path) -> str:
    """32 hex digits of a file's bytes."""
    digest = blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def forget_after(path: str | Path, step: int) -> None:
    """Delete lines of later steps, and an incomplete last line, from a JSON lines file whose lines have a `step`."""
    path = Path(path)
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        write_text(path, "".join(line for line in complete if json.loads(line)["step"] <= step))


def _partial(path: Path) -> Path:
    return path.with_name(f".partial-{os.getpid()}-{path.name}")


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk; Windows can neither open a folder nor sync what is read-only."""
    if ON_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
