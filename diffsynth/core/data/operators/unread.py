"""Files that a row names, known by their size and content and not yet decoded."""

import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple


class Unread:
    """An image before it is decoded; what asks for its size need not know that.

    Args:
        size: (width, height) that it will have.
        load: Decodes it.
        describe: Plain data that changes with the bytes of the file and with everything that is done to them.
    """

    def __init__(self, size: tuple[int, int], load: Callable[[], Any], describe: Callable[[], Any]):
        self.size, self.load, self.describe = size, load, describe

    @cached_property
    def identity(self) -> str:
        """32 hex digits; reads the file."""
        return identity(self.describe())

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def then(self, operator: Callable, description: Any, size: tuple[int, int] | None = None) -> "Unread":
        """What an operator will make of it."""
        describe = partial(_described, self.describe, description)
        return Unread(size or self.size, partial(_applied, operator, self.load), describe)


def _applied(operator: Callable, load: Callable[[], Any]) -> Any:
    return operator(load())


def _described(describe: Callable[[], Any], description: Any) -> list:
    return [describe(), description]


def read(value: Any) -> Any:
    """A value with all that is unread in it decoded."""
    if isinstance(value, Unread):
        return value.load()
    if isinstance(value, dict):
        return {name: read(element) for name, element in value.items()}
    return [read(element) for element in value] if isinstance(value, list) else value


class Variants(NamedTuple):
    """All that a sample may be in training.

    Args:
        size: (width, height) in pixels.
        weights: How likely each of its captions is.
        rows: By name, "" the plain one; files are unread.
    """

    size: tuple[int, int]
    weights: list[float]
    rows: dict[str, dict[str, Any]]


def unread_in(value: Any) -> Iterator[Unread]:
    """The files in a value."""
    if isinstance(value, Unread):
        yield value
    elif isinstance(value, list | dict):
        for element in value.values() if isinstance(value, dict) else value:
            yield from unread_in(element)


def is_unread(value: Any) -> bool:
    return any(True for _ in unread_in(value))


def identity(value: Any) -> str:
    """32 hex digits that change with a value: plain data, and what is unread in it.

    Raises:
        TypeError: The value is neither; what it holds cannot be known.
    """
    text = json.dumps(value, sort_keys=True, default=_identity_of_unread, ensure_ascii=False)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _identity_of_unread(value: Any) -> dict[str, str]:
    if not isinstance(value, Unread):
        raise TypeError(f"{value!r} is a {type(value).__name__}; a cache is made from plain data and files only.")
    return {"unread": value.identity}
