"""`Unread`, a file whose size and content hash are known but which is not decoded, and the variants of a sample."""

import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple


class Unread:
    """An image or a video that is not decoded yet; like an image, it has a size, a width and a height.

    Args:
        size: (width, height) in pixels of the decoded image; of a video (width, height, number of frames).
        load: Returns the decoded image.
        describe: Returns JSON data that changes with the file's bytes and with everything that is done to them.
    """

    def __init__(self, size: tuple[int, ...], load: Callable[[], Any], describe: Callable[[], Any]):
        self.size, self.load, self.describe = size, load, describe

    @cached_property
    def identity(self) -> str:
        """A hash (32 hex digits) of the description; reads the file."""
        return identity(self.describe())

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def then(self, operator: Callable, description: Any, size: tuple[int, ...] | None = None) -> "Unread":
        """The unread result of applying an operator, which `description` names, to this image."""
        describe = partial(_described, self.describe, description)
        return Unread(size or self.size, partial(_applied, operator, self.load), describe)

    def part(self, make: Callable, name: str, size: tuple[int, int]) -> "Unread":
        """The unread result of `make(value)`, of which `name` says which part of the value it is.

        Its description has this value's identity, which is all that a cache knows of it.
        """
        return Unread(size, partial(_applied, make, self.load), partial(_part_of, self, name))


def _part_of(whole: Unread, name: str) -> list[str]:
    return [whole.identity, name]


def _applied(operator: Callable, load: Callable[[], Any]) -> Any:
    return operator(load())


def _described(describe: Callable[[], Any], description: Any) -> list:
    return [describe(), description]


def read(value: Any) -> Any:
    """A value, with every `Unread` in it replaced by the decoded image."""
    if isinstance(value, Unread):
        return value.load()
    if isinstance(value, dict):
        return {name: read(element) for name, element in value.items()}
    return [read(element) for element in value] if isinstance(value, list) else value


class Variants(NamedTuple):
    """All augmentation variants of a sample.

    Args:
        size: (width, height) in pixels of its image, or (width, height, frames) of its video.
        weights: Weights of its captions.
        rows: The rows of the variants by name, with files unread; "" is the variant without augmentation.
    """

    size: tuple[int, ...]
    weights: list[float]
    rows: dict[str, dict[str, Any]]


def unread_in(value: Any) -> Iterator[Unread]:
    """Every `Unread` in a value."""
    if isinstance(value, Unread):
        yield value
    elif isinstance(value, list | dict):
        for element in value.values() if isinstance(value, dict) else value:
            yield from unread_in(element)


def is_unread(value: Any) -> bool:
    """Whether there is an `Unread` in a value."""
    return any(True for _ in unread_in(value))


def identity(value: Any) -> str:
    """A hash (32 hex digits) of a value, which consists of JSON data and `Unread`s.

    Raises:
        TypeError: The value contains anything else.
    """
    text = json.dumps(value, sort_keys=True, default=_identity_of_unread, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _identity_of_unread(value: Any) -> dict[str, str]:
    if not isinstance(value, Unread):
        raise TypeError(
            f"{value!r} is a {type(value).__name__}; a cache is made from JSON data and files only, so load it by an "
            "Operator with unread()."
        )
    return {"unread": value.identity}
