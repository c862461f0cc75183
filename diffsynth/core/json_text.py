"""JSON that other programs can read, too, and files of it that a power cut or a full disk may have damaged."""

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from .regular import require_regular

logger = logging.getLogger(__name__)


def to_json(value: Any, **options: Any) -> str:
    """Return a value as JSON text; numbers that are not finite become null, because JSON has none.

    Args:
        options: Options of `json.dumps`.
    """
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, **options)
    # Bytes that are no UTF-8, as in file names, become escapes of JSON such as \udc80.
    return text.encode("utf-8", "backslashreplace").decode()


def finite(value: Any) -> Any:
    """Return nested dicts and lists with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(text: str) -> Any:
    """Return the value of JSON text; numbers that are not finite (NaN, 1e400) are None.

    Raises:
        ValueError: It is no JSON, or is nested too deeply.
    """
    try:
        return finite(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse JSON that should be an object.

    Raises:
        ValueError: It is no JSON, or another value; the message begins with `source`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter if it is nested too deeply
        raise ValueError(f"{source} is no JSON: {text[:40]!r}; make the file anew, or take another.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is {text[:40]!r}, expected a JSON object; make the file anew, or take another.")
    return value


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape.

    Args:
        shape: A type; `[shape]` for a list of any length; `(shape, …)` for a list of this length; `{name: shape}` for a
            dict that has these names, among others; `{str: shape}` for a dict with any names.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(fits, value, shape))
    if not isinstance(shape, dict):
        is_bool = isinstance(value, bool)  # Python counts True and False as numbers
        return isinstance(value, shape) and (not is_bool or shape in (bool, object))
    if not isinstance(value, dict):
        return False
    shapes = dict.fromkeys(value, shape[str]) if str in shape else shape
    return all(name in value and fits(value[name], each) for name, each in shapes.items())


def read_lines(path: str | Path) -> list[dict]:
    """Return the objects of a JSON lines file; none if the file does not exist.

    A warning names the file if lines of it cannot be read, as after a power cut; these are left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    require_regular(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = [_object(line) for line in lines if line.strip()]
    objects = [each for each in found if each is not None]
    if len(objects) < len(found):
        logger.warning("%s: %d of its lines cannot be read and are left out.", path, len(found) - len(objects))
    return objects


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Return the value in a JSON file of ours; an empty one of its `kind`, dict or list, if the file does not exist.

    A damaged file counts as an empty one, and a warning names it.
    """
    path = Path(path)
    if not path.exists():
        return kind()
    require_regular(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    with suppress(ValueError):
        if isinstance(value := parse(text), kind):
            return value
    logger.warning("%s is damaged and left out: expected JSON with a %s, found %.99r.", path, kind.__name__, text)
    return kind()


def _object(text: str) -> dict | None:
    """The JSON object of a text; None if it is something else."""
    try:
        value = parse(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
