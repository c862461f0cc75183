"""Operators: functions that turn a cell of a table into training data; `a >> b` composes them.

An operator answers three questions about a cell: what it makes of it (`__call__`), whether it can, as far as headers of
files tell (`check`), and what it would make, with files described instead of read (`unread`).
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from ..sources.storage import EmbeddedFile, is_remote
from ..sources.urls import is_url


class Operator:
    """Base class; `a >> b` applies `a`, then `b`."""

    def __call__(self, data: Any) -> Any:
        raise NotImplementedError

    def check(self, data: Any) -> Any:
        """Raise the errors that the call would raise, as far as headers of files tell.

        Returns:
            The argument of the next operator's `check`; None if only the call itself can tell.
        """
        return None

    def unread(self, data: Any) -> Any:
        """What the call would return, with an `Unread` in place of each file.

        Raises:
            TypeError: The operator has no `unread`.
        """
        raise TypeError(
            f"{type(self).__name__} has no unread(), which describes its output without loading files; a cache "
            "needs one."
        )

    def __rshift__(self, other: Callable) -> "Chain":
        return Chain(self, other)


class Chain(Operator):
    """Applies `first`, then `second`."""

    def __init__(self, first: Operator, second: Callable):
        self.first, self.second = first, second

    def __call__(self, data: Any) -> Any:
        return self.second(self.first(data))

    def check(self, data: Any) -> Any:
        known = self.first.check(data)
        return None if known is None else check(self.second, known)

    def unread(self, data: Any) -> Any:
        return unread(self.second, self.first.unread(data))


def check(operator: Callable, data: Any) -> Any:
    """`operator.check(data)`; None for a plain callable, which cannot check anything."""
    return operator.check(data) if isinstance(operator, Operator) else None


def unread(operator: Callable, data: Any) -> Any:
    """`operator.unread(data)`.

    Raises:
        TypeError: `operator` is a plain callable, which has no `unread`.
    """
    if not isinstance(operator, Operator):
        raise TypeError(
            f"{operator!r} is no Operator, and only those describe their output without loading files, as a cache "
            "needs; make it a subclass of Operator with unread()."
        )
    return operator.unread(data)


class ToInt(Operator):
    """The value as an int."""

    def __call__(self, data: Any) -> int:
        return int(data)

    check = unread = __call__


class ToFloat(Operator):
    """The value as a float."""

    def __call__(self, data: Any) -> float:
        return float(data)

    check = unread = __call__


class ToStr(Operator):
    """The value as text; None becomes `none_value`."""

    def __init__(self, none_value: str = ""):
        self.none_value = none_value

    def __call__(self, data: Any) -> str:
        return self.none_value if data is None else str(data)

    check = unread = __call__


class ToList(Operator):
    """A list with the value as its only element."""

    def __call__(self, data: Any) -> list:
        return [data]

    check = unread = __call__


class SequentialProcess(Operator):
    """Applies `operator` to every element of a list."""

    def __init__(self, operator: Callable):
        self.operator = operator

    def __call__(self, data: Sequence) -> list:
        return apply_to_each(self.operator, data)

    def check(self, data: Sequence) -> list | None:
        known = apply_to_each(partial(check, self.operator), data)
        return None if None in known else known

    def unread(self, data: Sequence) -> list:
        return apply_to_each(partial(unread, self.operator), data)


SequencialProcess = SequentialProcess  # DiffSynth-Studio's spelling


def apply_to_each(function: Callable, elements: Sequence) -> list:
    """The results of `function` for each element; an error names the element."""
    results = []
    for element in elements:
        try:
            results.append(function(element))
        except Exception as error:  # Pillow's decoders raise exceptions of many types
            raise ValueError(f"{element!r:.300}: {error}") from error
    return results


class Route(Operator):
    """Applies the operator that `route` returns for a value."""

    def __call__(self, data: Any) -> Any:
        return self.route(data)(data)

    def check(self, data: Any) -> Any:
        return check(self.route(data), data)

    def unread(self, data: Any) -> Any:
        return unread(self.route(data), data)

    def route(self, data: Any) -> Callable:
        """The operator for a value.

        Raises:
            ValueError: There is none.
        """
        raise NotImplementedError


class RouteByType(Route):
    """Applies the operator of the first (type, operator) pair whose type fits the value; None fits any value."""

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable]]):
        self.operator_map = operator_map

    def route(self, data: Any) -> Callable:
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator
        expected = " or ".join(kind.__name__ for kind, _ in self.operator_map)
        raise ValueError(f"is of type {type(data).__name__}, expected {expected}")


class RouteByExtensionName(Route):
    """Applies the operator of the first (extensions, operator) pair that contains the extension of a path or URL.

    Extensions are lower case without a dot, as in `("jpg", "png")`; None fits any extension.
    """

    def __init__(self, operator_map: Sequence[tuple[Sequence[str] | None, Callable]]):
        self.operator_map = operator_map

    def route(self, data: str | EmbeddedFile) -> Callable:
        path = urlsplit(data).path if is_url(data) else str(data)
        extension = PurePath(path).suffix.lower().removeprefix(".")
        for extensions, operator in self.operator_map:
            if extensions is None or extension in extensions:
                return operator
        expected = ", ".join(chain.from_iterable(extensions for extensions, _ in self.operator_map))
        raise ValueError(f"has the extension {extension!r:.99}, expected one of {expected}")


class ToAbsolutePath(Operator):
    """Joins a file name to `base_path`; embedded files, and http(s) URLs if they are allowed, stay unchanged.

    Metadata may come from an untrusted source, so a name must not lead out of `base_path`, and a URL would make this
    machine ask servers that a row chooses. Symbolic links inside `base_path` are followed, because the caches of model
    hubs consist of links.
    """

    def __init__(self, base_path: str = "", allow_urls: bool = False):
        self.base_path, self.allow_urls = str(base_path), allow_urls

    def __call__(self, data: str | EmbeddedFile) -> str | EmbeddedFile:
        if isinstance(data, EmbeddedFile):
            return data
        if not is_url(data):
            return os.path.join(self.base_path, self._inside(data))
        if not self.allow_urls:
            raise ValueError(
                "is a URL, which is not fetched; save the file in the folder, or set dataset.allow_urls=true"
            )
        return data

    check = unread = __call__

    def _inside(self, name: str) -> PurePath:
        """A name relative to `base_path`; it may be given as an absolute path."""
        if is_remote(self.base_path):
            name = name.removeprefix(self.base_path.rstrip("/") + "/")
        path = PurePath(os.path.normpath(name))
        if path.anchor and not is_remote(self.base_path):
            for folder in (os.path.abspath(self.base_path), os.path.realpath(self.base_path)):
                if path.is_relative_to(folder):
                    return path.relative_to(folder)
        if path.anchor or path.parts[:1] == ("..",):
            raise ValueError(f"leads out of {self.base_path or 'the working folder'}; write it relative to that folder")
        return path
