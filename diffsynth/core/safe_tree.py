"""Convert nested state, such as an optimizer's, to JSON and tensors and back: reading it cannot run code."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

TENSOR, ITEMS, TUPLE, NUMBER = "__tensor__", "__items__", "__tuple__", "__number__"


def split_state(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into a value that JSON can hold and a dict of their tensors by path.

    Raises:
        TypeError: A value is neither a tensor nor a JSON value, or two keys cannot be told apart; names the path.
    """
    if isinstance(tree, Tensor):
        return {TENSOR: path}, {path: tree}
    if isinstance(tree, dict):
        pairs, tensors = _split_all(tree.items(), path)
        plain = all(isinstance(key, str) and not key.startswith("__") for key in tree)
        return (dict(pairs) if plain else {ITEMS: [list(pair) for pair in pairs]}), tensors
    if isinstance(tree, (list, tuple)):
        pairs, tensors = _split_all(enumerate(tree), path)
        values = [value for _, value in pairs]
        return ({TUPLE: values} if isinstance(tree, tuple) else values), tensors
    if isinstance(tree, float) and not math.isfinite(tree):
        return {NUMBER: str(tree)}, {}  # JSON has no such numbers
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree, {}
    raise TypeError(
        f"{path} is a {type(tree).__name__}, which cannot be saved; expected a tensor, number, string, None, list, "
        "tuple or dict."
    )


def _split_all(items: Iterable[tuple[Any, Any]], path: str) -> tuple[list[tuple], dict[str, Tensor]]:
    """The (key, JSON value) pairs of a container's (key, value) pairs, and all their tensors by path."""
    pairs, tensors = [], {}
    for key, value in items:
        where = f"{path}.{key}".lstrip(".")
        plain, found = split_state(value, where)
        if not isinstance(key, (int, str)):
            raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}; expected an int or a str.")
        if tensors.keys() & found:
            raise TypeError(f"{where}: the key {key!r} gives a tensor the same path as another key; rename it.")
        pairs.append((key, plain))
        tensors |= found
    return pairs, tensors


def join_state(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The nested state that `split_state` split."""
    if isinstance(plain, list):
        return [join_state(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if NUMBER in plain:
        return float(plain[NUMBER])
    if TUPLE in plain:
        return tuple(join_state(value, tensors) for value in plain[TUPLE])
    return {key: join_state(value, tensors) for key, value in plain.get(ITEMS, plain.items())}
