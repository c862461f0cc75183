"""Refuse what is no file where one is expected, before it is opened."""

import io
import os
import stat
from pathlib import Path


def require_regular(path: str | Path) -> None:
    """Refuse a folder, a pipe or a device: to open a pipe waits for ever, and a device has no end.

    Raises:
        FileNotFoundError: There is nothing of that name.
        io.UnsupportedOperation: It is none; this is a ValueError, as of wrong input, and an OSError, as of `open`.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise io.UnsupportedOperation(f"{path} is {found}; expected a file")
