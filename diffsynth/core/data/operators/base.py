"""Operators: small functions from a cell of a table to what is trained on, which compose by `>>`."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import PurePath
from urllib.parse import urlsplit

from ..sources.storage import EmbeddedFile
from .picture_files import is_url


class Operator:
    """One step; `a >> b` applies `a`, then `b`."""

    def __call__(self, data):
        raise NotImplementedError

    def check(self, data):
        """Raises what the call would raise, as far as headers tell.

        Returns:
            What the next step's `check` takes, None if only the call itself can tell.
        """
        return None

    def unread(self, data):
        """What the call would return, with files in it `Unread`.

        Raises:
            TypeError: The operator cannot say so before it is called.
        """
        raise TypeError(f"{type(self).__name__} cannot tell what it makes without making it; it has no unread()")

    def __rshift__(self, other: Callable) -> "Chain":
        return Chain(self, other)


class Chain(Operator):
    """Applies `first`, then `second`."""

    def __init__(self, first: Operator, second: Callable):
        self.first, self.second = first, second

    def __call__(self, data):
        return self.second(self.first(data))

    def check(self, data):
        known = self.first.check(data)
        return None if known is None else check(self.second, known)

    def unread(self, data):
        return unread(self.second, self.first.unread(data))


def check(operator: Callable, data):
    """Checks `data` as `operator` does; of a plain callable nothing is known before it is called."""
    return operator.check(data) if isinstance(operator, Operator) else None


def unread(operator: Callable, data):
    """What `operator` would return, with files in it `Unread`."""
    if not isinstance(operator, Operator):
        raise TypeError(f"{operator!r} is no Operator, and cannot tell what it makes without making it")
    return operator.unread(data)


class ToInt(Operator):
    def __call__(self, data) -> int:
        return int(data)

    check = unread = __call__


class ToFloat(Operator):
    def __call__(self, data) -> float:
        return float(data)

    check = unread = __call__


class ToStr(Operator):
    """Text of a value, `none_value` for None."""

    def __init__(self, none_value: str = ""):
        self.none_value = none_value

    def __call__(self, data) -> str:
        return self.none_value if data is None else str(data)

    check = unread = __call__


class ToList(Operator):
    """A list of the one value."""

    def __call__(self, data) -> list:
        return [data]

    check = unread = __call__


class SequentialProcess(Operator):
    """Applies `operator` to every element of a list."""

    def __init__(self, operator: Callable):
        self.operator = operator

    def __call__(self, data: Sequence) -> list:
        return apply_to_each(self.operator, data)

    def check(self, data: Sequence):
        known = apply_to_each(partial(check, self.operator), data)
        return None if None in known else known

    def unread(self, data: Sequence) -> list:
        return apply_to_each(partial(unread, self.operator), data)


def apply_to_each(function: Callable, elements: Sequence) -> list:
    """Results of `function`, whose errors name the element."""
    results = []
    for element in elements:
        try:
            results.append(function(element))
        except Exception as error:  # Pillow's decoders raise nearly anything
            raise ValueError(f"{element!r}: {error}") from error
    return results


class Route(Operator):
    """Applies the operator that `route` chooses for a value."""

    def __call__(self, data):
        return self.route(data)(data)

    def check(self, data):
        return check(self.route(data), data)

    def unread(self, data):
        return unread(self.route(data), data)

    def route(self, data) -> Callable:
        raise NotImplementedError


class RouteByType(Route):
    """Applies the operator of the first (type, operator) pair whose type the value has; type None takes any value."""

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable]]):
        self.operator_map = operator_map

    def route(self, data) -> Callable:
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator
        expected = " or ".join(kind.__name__ for kind, _ in self.operator_map)
        raise ValueError(f"is of type {type(data).__name__}, expected {expected}")


class RouteByExtensionName(Route):
    """Applies the operator of the first (extensions, operator) pair that has the extension of a path or URL.

    Extensions are lower case without a dot, as in `("jpg", "png")`; None takes any.
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
        raise ValueError(f"has the extension {extension!r}, expected one of {expected}")


class ToAbsolutePath(Operator):
    """Path of a file named relative to `base_path`; http(s) URLs and embedded files stay as they are.

    Metadata is data from elsewhere: a name may not lead out of `base_path`. Links inside it are followed, since
    the caches of model hubs consist of them.
    """

    def __init__(self, base_path: str = ""):
        self.base_path = base_path

    def __call__(self, data: str | EmbeddedFile) -> str | EmbeddedFile:
        if isinstance(data, EmbeddedFile) or is_url(data):
            return data
        path = PurePath(os.path.normpath(data))
        if path.anchor or path.parts[:1] == ("..",):
            raise ValueError(f"leads out of {self.base_path or 'the working folder'}; write it relative to that folder")
        return os.path.join(self.base_path, path)

    check = unread = __call__
