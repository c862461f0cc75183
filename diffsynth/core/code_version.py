"""What code a unit runs: its own and what that refers to, less comments, docstrings, annotations and formatting."""

import ast
import copy
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from hashlib import blake2b
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

LIBRARIES = {"builtins", "torch", "abc", "typing", "diffusers", "transformers"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


class Reference(NamedTuple):
    """A name that code uses, plain (`PROMPT_TEMPLATE`) or as an attribute (`vae.encode`)."""

    name: str
    is_attribute: bool


class Definition(NamedTuple):
    """A definition's text, without what does not run, and the names it uses."""

    text: str
    uses: frozenset[Reference]


def code_version(functions: Iterable[Callable], classes: Iterable[type]) -> tuple[str, set[str]]:
    """16 hex digits that change with what some functions run, and the names of all attributes they use.

    Names are followed through the modules of `classes` and of their bases, and from there into other modules of these
    packages, but not into libraries: functions, classes, and constants, of which plain ones count by their value. An
    attribute leads to every method and function of its name (`vae.encode` to every `encode`), and to what classes set
    it to: too much now and then. Modules of a network call each other unseen; see `forwards`.
    """
    modules = _modules(classes)
    packages = {_package(module.__name__) for module in modules}
    definitions = [_definition_of(function) for function in functions]
    texts, seen, left = (
        {definition.text for definition in definitions},
        set(),
        [used for definition in definitions for used in definition.uses],
    )
    while left:
        reference = left.pop()
        if reference in seen:
            continue
        seen.add(reference)
        naming = [module for module in modules if _names(module, reference.name)]
        homes = {_home(module, reference, packages) for module in naming}
        if new := homes - {None, *modules}:
            modules += sorted(new, key=lambda module: module.__name__)
            left, seen = [*seen, *left], set()  # what was looked for may be there too
            continue
        found = [definition for module in naming for definition in _find(module, reference)]
        texts |= {definition.text for definition in found}
        left += [used for definition in found for used in definition.uses]
    version = blake2b("\n".join(sorted(texts)).encode(), digest_size=8).hexdigest()
    return version, {name for name, is_attribute in seen if is_attribute}


def forwards(network: nn.Module) -> dict[type, Callable]:
    """The `forward` of each class of modules in a network, libraries' aside."""
    classes = sorted({type(module) for module in network.modules()}, key=lambda cls: (cls.__module__, cls.__qualname__))
    return {cls: cls.forward for cls in classes if _package(cls.forward.__module__) not in LIBRARIES}


def plain_text(value: Any) -> str | None:
    """Plain data as JSON, None of anything else."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None


def _modules(classes: Iterable[type]) -> list[ModuleType]:
    names = {base.__module__ for cls in classes for base in cls.__mro__}
    return [sys.modules[name] for name in sorted(names) if _package(name) not in LIBRARIES and name in sys.modules]


def _package(module: str) -> str:
    return module.split(".")[0]


def _names(module: ModuleType, name: str) -> bool:
    """Whether a module has or defines a name, or may make it when asked; few of them do, and the rest is slower."""
    return name in vars(module) or name in _defined_names(module) or "__getattr__" in vars(module)


@cache
def _defined_names(module: ModuleType) -> frozenset[str]:
    return frozenset(reference.name for reference in _definitions(module))


def _home(module: ModuleType, reference: Reference, packages: set[str]) -> ModuleType | None:
    """The module of these packages that a plain name of `module` was imported from, or that it stands for."""
    value = None if reference.is_attribute else getattr(module, reference.name, None)
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) and _package(name) in packages else None


def _find(module: ModuleType, reference: Reference) -> Iterator[Definition]:
    """What a module defines under a name, or under the one that it imported as this."""
    definitions, plain_name = _definitions(module), Reference(reference.name, False)
    if reference.is_attribute:
        yield from definitions.get(reference, ())
        if plain_name in definitions:  # it may be the module's
            yield from _find(module, plain_name)
        return
    value = getattr(module, reference.name, None)
    if value is not None and (text := plain_text(value)) is not None:
        yield Definition(f"{reference.name} = {text}", frozenset())
        return
    yield from definitions.get(reference, ())
    original = getattr(value, "__name__", None)
    original = original.rpartition(".")[2] if isinstance(original, str) else reference.name
    if original != reference.name:
        yield Definition(f"{reference.name} = {original}", frozenset([Reference(original, False)]))


@cache
def _definitions(module: ModuleType) -> dict[Reference, list[Definition]]:
    found: dict[Reference, list[Definition]] = {}
    for node in _statements(ast.parse(_source(module))):
        named = _defined(node, in_class=False)
        if isinstance(node, ast.ClassDef):
            named += [pair for inner in _statements(node) for pair in _defined(inner, in_class=True)]
        for reference, definition in named:
            found.setdefault(reference, []).append(_definition(definition))
    return found


@cache
def _definition_of(function: Callable) -> Definition:
    return _definition(ast.parse(textwrap.dedent(inspect.getsource(function))))


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # an empty file, or none
        return ""


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Those of a module or class, also where they depend on a condition."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        else:
            yield child


def _defined(node: ast.AST, in_class: bool) -> list[tuple[Reference, ast.AST]]:
    """The names that a statement defines: its own, those it assigns, and in a method those of `self`."""
    if isinstance(node, ASSIGNMENTS):
        return [(Reference(name.id, in_class), node) for name in _targets(node) if isinstance(name, ast.Name)]
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return []
    inner = [definition for definition in ast.walk(node) if in_class and isinstance(definition, ASSIGNMENTS)]
    own = [(t.attr, definition) for definition in inner for t in _targets(definition) if isinstance(t, ast.Attribute)]
    return [(Reference(node.name, in_class), node), *((Reference(name, True), definition) for name, definition in own)]


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> Iterator[ast.AST]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        yield from ast.walk(target)


class _OnlyWhatRuns(ast.NodeTransformer):
    """Takes docstrings and annotations away."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, FUNCTIONS):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign) and node.value:  # without one it may be a dataclass's field
            return ast.copy_location(ast.Assign([node.target], node.value), node)
        return node


def _definition(node: ast.AST) -> Definition:
    node = _OnlyWhatRuns().visit(copy.deepcopy(node))
    names = {Reference(inner.id, False) for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    attributes = {Reference(inner.attr, True) for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    if isinstance(node, ASSIGNMENTS):  # what makes a value is followed by name only: `from_pretrained` is many things
        attributes = set()
    return Definition(ast.unparse(node), frozenset(names | attributes))
