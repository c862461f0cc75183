"""Asking a hub for files: whether that is allowed, whether it answers, and which folders are not whole yet."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROBE_SECONDS = 5


def downloads_are_off() -> bool:
    """Whether DIFFSYNTH_SKIP_DOWNLOAD says that hubs may not be asked."""
    return os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() in ("1", "true")


def modelscope_endpoint() -> str:
    """The address of ModelScope, or what MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN say instead."""
    from modelscope_hub.config import HubConfig

    return HubConfig().endpoint


def answers(endpoint: str) -> bool:
    """Whether the hub is reachable: asked first because its client would retry for minutes."""
    import requests

    found = []

    def ask():
        with suppress(requests.RequestException):
            found.append(requests.head(endpoint, timeout=PROBE_SECONDS))

    # In a thread because no timeout covers the lookup of the name.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(found)


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark a folder while it is downloaded: afterwards nothing else in it tells that a file is still to come."""
    folder.mkdir(parents=True, exist_ok=True)
    _marker(folder).touch()
    yield
    _marker(folder).unlink()


def is_whole(folder: Path) -> bool:
    """Whether a folder has files and none is still to come."""
    return folder.is_dir() and any(folder.iterdir()) and not _marker(folder).exists()


def _marker(folder: Path) -> Path:
    return folder / ".unfinished"
