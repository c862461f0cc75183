"""The console of a process, whose loss ends no work."""

import atexit
import os
import sys
from typing import Any, TextIO

STREAMS = ("stdout", "stderr")


class LossyStream:
    """A text stream whose writes never raise: what cannot be written is dropped, and the next text is tried again.

    The reader of a pipe may have ended (`| head -1`), a log collector may be restarting, or a terminal be closed.

    Args:
        stream: The stream that is written to; it has all other attributes.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed, or its encoding lacks a character
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_console() -> None:
    """Let writing to standard output and error never raise, from now on; every entry script and tool calls this.

    Characters that the console's encoding lacks are written as escapes, such as `\\u2026`.
    """
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, LossyStream):  # None: pythonw.exe has no console
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LossyStream(stream))
    atexit.unregister(_let_go)
    atexit.register(_let_go)


def _let_go() -> None:
    """Point a lost console to nowhere, because Python writes the rest of its text at its end, and complains."""
    for name in STREAMS:
        stream = getattr(sys, name)
        if isinstance(stream, LossyStream):
            try:
                stream.stream.flush()
            except (OSError, ValueError):
                _silence(stream)


def _silence(stream: LossyStream) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # it has no descriptor, or a closed one
        return
