"""Read a model's small files, which may be anybody's: every fault is an error of one line that names the file."""

import json
from pathlib import Path
from typing import Any

from ..regular import require_regular

MOST_BYTES = 1 << 26  # of a JSON file; a guess: released indices of shards have a few MB


def read_object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file, such as a config.json or the index of shards.

    Raises:
        ValueError: The file is no JSON, holds something else than an object, or is too large.
    """
    try:
        require_regular(file)
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, expected at most {MOST_BYTES}")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, expected an object {{…}}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used: {shown(error)}; download it again.") from error
    return content


def read_pretrained(kind: type, folder: Path, **options: Any) -> Any:
    """Return `kind.from_pretrained(folder)` of a class of transformers; no Python code that the folder may hold runs.

    Without `trust_remote_code=False` the library would ask on the terminal whether to run it.

    Raises:
        ValueError: The folder's files cannot be read, or can only be read by their own code.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # the library's errors for a malformed file are of nearly any class
        raise ValueError(
            f"{folder} cannot be read as {kind.__name__}: {shown(error)}; download it again, and use the folder that "
            "was released with the weights."
        ) from error


def shown(error: BaseException) -> str:
    """The first line of an error's message, after its class if that is a library's or Python's own fault."""
    lines = str(error).strip().splitlines() or [""]
    name = "" if type(error) is ValueError and lines[0] else f"{type(error).__name__}: "
    return f"{name}{lines[0][:300]}".rstrip(": .")
