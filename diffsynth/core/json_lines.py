"""A JSON lines file that a run appends to; a full disk loses no line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import append_text, going_on_without
from .json_text import to_json


class JsonLines:
    """A JSON lines file that grows during a run; each line has a `step`.

    Lines that cannot be written, because the disk is full, are kept in memory and written with the next one.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.waiting: list[str] = []

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null."""
        self.waiting.append(to_json({"step": step, **values}) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that are waiting."""
        with going_on_without(self.path):
            if self.waiting:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                append_text(self.path, "".join(self.waiting))
                self.waiting.clear()
