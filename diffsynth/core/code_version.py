"""Hash the code that functions run, so that a cache notices when the code of a pipeline unit changes.

The hash covers the functions and everything in the same packages that they refer to. Comments, docstrings, annotations
and formatting don't change it.
"""

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
    """A definition's code, without docstrings and annotations, and the names that it uses."""

    text: str
    uses: frozenset[Reference]


def code_version(functions: Iterable[Callable], classes: Iterable[type]) -> tuple[str, set[str]]:
    """A hash (16 hex digits) of the code that `functions` run, and the names of all attributes that this code uses.

    The search starts in the modules that define `classes` and their bases. It follows names into other modules of the
    same packages, but not into libraries. It finds functions, classes and constants; a constant of plain data counts by
    its value. An attribute stands for every method, function and class attribute of its name (`vae.encode` for every
    `encode`), so that the hash may cover more code than runs. The search doesn't see the calls that a network's modules
    make to each other; see `forwards`.
    """
    modules = _modules(classes)
    packages = {_package(module.__name__) for module in modules}
    definitions = [_definition_of(function) for function in functions]
    texts = {definition.text for definition in definitions}
    seen, to_visit = set(), [used for definition in definitions for used in definition.uses]
    while to_visit:
        reference = to_visit.pop()
        if reference in seen:
            continue
        seen.add(reference)
        naming = [module for module in modules if _names(module, reference.name)]
        homes = {_home(module, reference, packages) for module in naming}
        if new := homes - {None, *modules}:
            modules += sorted(new, key=lambda module: module.__name__)
            to_visit, seen = [*seen, *to_visit], set()  # the new modules may define names that were visited before
            continue
        found = [definition for module in naming for definition in _find(module, reference)]
        texts |= {definition.text for definition in found}
        to_visit += [used for definition in found for used in definition.uses]
    version = blake2b("\n".join(sorted(texts)).encode(), digest_size=8).hexdigest()
    return version, {name for name, is_attribute in seen if is_attribute}


def forwards(network: nn.Module) -> dict[type, Callable]:
    """The `forward` of each class of modules in a network, except classes of libraries."""
    classes = sorted({type(module) for module in network.modules()}, key=lambda cls: (cls.__module__, cls.__qualname__))
    return {cls: cls.forward for cls in classes if _package(cls.forward.__module__) not in LIBRARIES}


def plain_text(value: Any) -> str | None:
    """A value as JSON text; None if JSON cannot hold it."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None


def _modules(classes: Iterable[type]) -> list[ModuleType]:
    """The modules that define the classes and their bases, except those of libraries."""
    names = {base.__module__ for cls in classes for base in cls.__mro__}
    return [sys.modules[name] for name in sorted(names) if _package(name) not in LIBRARIES and name in sys.modules]


def _package(module: str) -> str:
    return module.split(".")[0]


def _names(module: ModuleType, name: str) -> bool:
    """Whether a module has or defines a name, or has a `__getattr__` that may; a quick test, as few modules do."""
    return name in vars(module) or name in _defined_names(module) or "__getattr__" in vars(module)


@cache
def _defined_names(module: ModuleType) -> frozenset[str]:
    return frozenset(reference.name for reference in _definitions(module))


def _home(module: ModuleType, reference: Reference, packages: set[str]) -> ModuleType | None:
    """The module, if it is one of these packages, from which `module` imported a plain name, or that is its value."""
    value = None if reference.is_attribute else getattr(module, reference.name, None)
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) and _package(name) in packages else None


def _find(module: ModuleType, reference: Reference) -> Iterator[Definition]:
    """The definitions that a module has for a name, or for the name that it imported under this one."""
    definitions, plain_name = _definitions(module), Reference(reference.name, False)
    if reference.is_attribute:
        yield from definitions.get(reference, ())
        if plain_name in definitions:  # an attribute of the module itself, as in `lists.tripled`
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
    """All definitions of a module: its own names, and the methods and attributes of its classes."""
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
    except (OSError, TypeError):  # the file is empty, or the module has none
        return ""


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, including those inside `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        else:
            yield child


def _defined(node: ast.AST, in_class: bool) -> list[tuple[Reference, ast.AST]]:
    """The names that a statement defines: a function's or class's, assigned names, and attributes set in a method."""
    if isinstance(node, ASSIGNMENTS):
        return [(Reference(name.id, in_class), node) for name in _targets(node) if isinstance(name, ast.Name)]
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return []
    inner = [statement for statement in ast.walk(node) if in_class and isinstance(statement, ASSIGNMENTS)]
    targets = [(target, statement) for statement in inner for target in _targets(statement)]
    own = [
        (Reference(target.attr, True), statement) for target, statement in targets if isinstance(target, ast.Attribute)
    ]
    return [(Reference(node.name, in_class), node), *own]


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> Iterator[ast.AST]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        yield from ast.walk(target)


class _OnlyWhatRuns(ast.NodeTransformer):
    """Removes docstrings and annotations."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, FUNCTIONS):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign) and node.value:  # one without a value may be a field of a dataclass
            return ast.copy_location(ast.Assign([node.target], node.value), node)
        return node


def _definition(node: ast.AST) -> Definition:
    """The code of a syntax tree and the names in it."""
    node = _OnlyWhatRuns().visit(copy.deepcopy(node))
    names = {Reference(inner.id, False) for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    attributes = {Reference(inner.attr, True) for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    if isinstance(node, ASSIGNMENTS):  # following `from_pretrained`, say, would lead to every method of that name
        attributes = set()
    return Definition(ast.unparse(node), frozenset(names | attributes))
