"""Downloads from hubs: whether they are allowed, whether the hub answers, and which folders are complete."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

FOR_ALL = 0o666  # permissions
PROBE_SECONDS = 5  # a guess: time limit of the first request to a hub


def downloads_are_off() -> bool:
    """Whether DIFFSYNTH_SKIP_DOWNLOAD switches downloads off."""
    return os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() in ("1", "true")


def modelscope_endpoint() -> str:
    """Return the URL of ModelScope; the environment variables MODELSCOPE_ENDPOINT and MODELSCOPE_DOMAIN set another."""
    from modelscope_hub.config import HubConfig

    return HubConfig().endpoint


def answers(endpoint: str) -> bool:
    """Whether a hub is reachable; checked before its client is called, because that would retry for minutes."""
    import requests

    responses = []

    def ask() -> None:
        with suppress(requests.RequestException):
            responses.append(requests.head(endpoint, timeout=PROBE_SECONDS))

    # In a thread, because the timeout does not cover the DNS lookup.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(responses)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time runs this block for a folder, also across machines that share the file system.

    The lock is an empty hidden file beside the folder, or in it where nothing can be written beside it. It stays: if it
    were deleted, a process that waits for the old file and one that makes a new file could both be inside. Other users
    of the folder may take it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(folder.parent, os.W_OK)
    lock = folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"
    with FileLock(lock, mode=FOR_ALL):
        with suppress(PermissionError):  # another user has made it, and has done this
            lock.chmod(FOR_ALL)
        yield


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Inside, a marker file in the folder says that its download is unfinished; an interruption leaves it there."""
    folder.mkdir(parents=True, exist_ok=True)
    _marker(folder).touch()
    yield
    _marker(folder).unlink()


def is_complete(folder: Path) -> bool:
    """Whether a folder has files, and no download into it was interrupted."""
    return folder.is_dir() and any(folder.iterdir()) and not _marker(folder).exists()


def _marker(folder: Path) -> Path:
    return folder / ".unfinished"
