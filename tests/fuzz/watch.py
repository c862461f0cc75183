"""Watches what a reader does: which files it opens, changes and deletes, which programs and hosts it calls."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_watched: list[tuple[Path, ...]] = []  # the folder that the running reader may look into, and those that it may read
_offences: list[str] = []
ROOT = Path(__file__).parents[2]
PLACES = tempfile.gettempdir()  # of the files that belong to no library
PATHS = {"open": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "shutil.rmtree": 1, "sqlite3.connect": 1}
CALLS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")


def _notice(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event in CALLS:
        _offences.append(f"{event} {arguments}")
    reads = event == "open" and arguments[1] in ("r", "rb")
    folders = _watched[-1] if reads else _watched[-1][:1]
    for path in arguments[: PATHS.get(event, 0)]:
        if isinstance(path, str | bytes | os.PathLike) and _is_outside(Path(os.fsdecode(path)), folders):
            _offences.append(f"{event} {path}")


def _is_outside(path: Path, folders: tuple[Path, ...]) -> bool:
    """Whether it is a file of nobody's library that lies outside these folders."""
    bare = str(path).removeprefix("file:").split("?")[0]  # SQLite's paths may be URIs
    whole = Path(os.path.normpath(os.path.abspath(bare)))
    if whole == Path("/etc/passwd"):
        return True
    return whole.is_relative_to(PLACES) and not any(map(whole.is_relative_to, (*folders, ROOT)))


sys.addaudithook(_notice)  # for the whole process: it cannot be removed


@contextmanager
def watched(folder: Path, *readable: Path) -> Iterator[list[str]]:
    """Inside, what happens outside of a folder is appended to the list, but reading files in the others."""
    _offences.clear()
    _watched.append((folder, *readable))
    try:
        yield _offences
    finally:
        _watched.pop()
