"""What code a unit runs: its own and what that refers to, less comments, docstrings, annotations and formatting."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import blake2b
from types import ModuleType
from typing import NamedTuple

LIBRARIES = {"builtins", "torch", "abc", "typing", "diffusers", "transformers"}
CONSTANTS = (str, int, float, bool, tuple, type(None))


class Reference(NamedTuple):
    """A name that code uses, plain (`PROMPT_TEMPLATE`) or as an attribute (`vae.encode`)."""

    name: str
    is_attribute: bool


def code_version(cls: type, methods: Iterable[str], *others: type) -> tuple[str, set[str]]:
    """16 hex digits that change with what some methods of a class run, and the names of all attributes they use.

    Names are followed through the modules of the class, of `others`, and of their bases, less libraries': functions,
    classes, and constants, which count by their value. An attribute leads to every method of its name (`vae.encode` to
    every `encode`): too much now and then, never too little.
    """
    methods = [name for name in methods if hasattr(cls, name)]
    parts = [_part(ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, name))))) for name in methods]
    modules = _modules(cls, *others)
    texts, seen = {text for text, _ in parts}, {Reference(name, True) for name in methods}
    left = [reference for _, uses in parts for reference in uses]
    while left:
        reference = left.pop()
        if reference not in seen:
            seen.add(reference)
            found = [part for module in modules for part in _find(module, reference)]
            texts |= {text for text, _ in found}
            left += [used for _, uses in found for used in uses]
    version = blake2b("\n".join(sorted(texts)).encode(), digest_size=8).hexdigest()
    return version, {name for name, is_attribute in seen if is_attribute}


def _modules(*classes: type) -> list[ModuleType]:
    names = {base.__module__ for cls in classes for base in cls.__mro__}
    return [sys.modules[name] for name in sorted(names) if name.split(".")[0] not in LIBRARIES and name in sys.modules]


def _find(module: ModuleType, reference: Reference) -> Iterator[tuple[str, frozenset[Reference]]]:
    """What a module defines under a name: texts, and the names each uses."""
    value = getattr(module, reference.name, ...)
    if isinstance(value, CONSTANTS) and not reference.is_attribute:
        yield f"{reference.name} = {value!r}", frozenset()
    else:
        yield from _definitions(module).get(reference, ())


@cache
def _definitions(module: ModuleType) -> dict[Reference, list[tuple[str, frozenset[Reference]]]]:
    found: dict[Reference, list] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(Reference(node.name, False), []).append(_part(node))
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found.setdefault(Reference(method.name, True), []).append(_part(method))
    return found


def _part(node: ast.AST) -> tuple[str, frozenset[Reference]]:
    """A definition's text without what does not run, and the names it uses."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner, clean=False) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
        if isinstance(inner, ast.FunctionDef):
            inner.returns = None
        if isinstance(inner, ast.arg):
            inner.annotation = None
    names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    own = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
    own |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    uses = {Reference(name.id, False) for name in names if name.id not in own}
    uses |= {Reference(inner.attr, True) for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    return ast.unparse(node), frozenset(uses)
