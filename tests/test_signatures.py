"""What every public function of the package says of its arguments: their types, and the shapes of tensors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffsynth"
# (B, C, h, w), (N,), (), (1, …), or a word for it.
SHAPE = re.compile(r"\((?:[A-Za-z0-9…*'][^()]*,[^()]*|)\)|of any shape|scalar")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public functions and methods of a package by their full names, those within functions left out."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            for each in inner:
                if isinstance(each, FUNCTIONS) and not each.name.startswith("_"):
                    yield f"{file.relative_to(PACKAGE)}:{each.name}", each


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    own = function.args
    return [a for a in (*own.posonlyargs, *own.args, *own.kwonlyargs) if a.arg not in ("self", "cls", "ctx")]


@pytest.mark.parametrize("package", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_public_arguments_have_types(package):
    # The parameters of a unit's `process` and `tokenize` are names of inputs: what they are, the request says.
    inputs = ("process", "process_batch", "tokenize")
    found = dict(functions(PACKAGE / package))
    untyped = {
        f"{name}({a.arg})"
        for name, f in found.items()
        for a in parameters(f)
        if a.annotation is None and f.name not in inputs
    }
    assert untyped == set()


@pytest.mark.parametrize("package", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_functions_of_tensors_say_their_shapes(package):
    """Functions that are documented; an override without a docstring has that of what it overrides."""
    silent = set()
    for name, function in functions(PACKAGE / package):
        annotations = [a.annotation for a in parameters(function)] + [function.returns]
        takes_tensors = any(isinstance(a, ast.Name) and a.id == "Tensor" for a in annotations)
        documentation = ast.get_docstring(function)
        if takes_tensors and documentation and not SHAPE.search(documentation):
            silent.add(name)
    assert silent == set()
