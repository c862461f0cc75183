"""Downloads from model hubs: whether they are allowed, whether the hub answers, which folders are complete."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROBE_SECONDS = 5  # that a hub has to answer a first request; a guess


def downloads_are_off() -> bool:
    """Whether DIFFSYNTH_SKIP_DOWNLOAD switches downloads off."""
    return os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() in ("1", "true")


def modelscope_endpoint() -> str:
    """The address of ModelScope, which MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN override."""
    from modelscope_hub.config import HubConfig

    return HubConfig().endpoint


def answers(endpoint: str) -> bool:
    """Whether a hub is reachable; checked first, because its client would retry for minutes."""
    import requests

    found = []

    def ask() -> None:
        with suppress(requests.RequestException):
            found.append(requests.head(endpoint, timeout=PROBE_SECONDS))

    # In a thread, because the timeout does not cover the DNS lookup.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(found)


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Keep a marker file in a folder while it is downloaded; after an interruption only the marker tells that."""
    folder.mkdir(parents=True, exist_ok=True)
    _marker(folder).touch()
    yield
    _marker(folder).unlink()


def is_whole(folder: Path) -> bool:
    """Whether a folder has files and no download into it was interrupted."""
    return folder.is_dir() and any(folder.iterdir()) and not _marker(folder).exists()


def _marker(folder: Path) -> Path:
    return folder / ".unfinished"
