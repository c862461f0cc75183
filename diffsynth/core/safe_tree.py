"""Nested state, such as an optimizer's, as tensors and JSON: nothing in it can run code when it is read."""

from typing import Any

from torch import Tensor

TENSOR, ITEMS, TUPLE = "__tensor__", "__items__", "__tuple__"


def split_state(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A tree of dicts, lists, numbers and tensors as what JSON can hold, and the tensors by their path in it.

    Raises:
        TypeError: Something in it is neither; names where.
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
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree, {}
    raise TypeError(f"{path} is a {type(tree).__name__}, which is neither a tensor nor something JSON can hold.")


def _split_all(items, path: str) -> tuple[list[tuple], dict[str, Tensor]]:
    pairs, tensors = [], {}
    for key, value in items:
        where = f"{path}.{key}".lstrip(".")
        plain, found = split_state(value, where)
        if not isinstance(key, (int, str)) or tensors.keys() & found:
            raise TypeError(f"{where}: the key {key!r} cannot be told from others, or is neither a number nor a word.")
        pairs.append((key, plain))
        tensors |= found
    return pairs, tensors


def join_state(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `split_state` took apart."""
    if isinstance(plain, list):
        return [join_state(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if TUPLE in plain:
        return tuple(join_state(value, tensors) for value in plain[TUPLE])
    return {key: join_state(value, tensors) for key, value in plain.get(ITEMS, plain.items())}
