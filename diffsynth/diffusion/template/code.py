"""Imports a template's `model.py`, and checks its declarations before any weight is read.

The imported modules are submodules of this one. Their names hold the path and the digest of the file, so that another
process, which unpickles an object of a template, finds the module by its name.
"""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from ...core.code_version import code_version
from ...core.loader import refuse_pickle

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

CODE = "model.py"
PIPE = re.compile(r"\bpipe\b")
# `pipe(…)`, `kwargs["pipe"](…)`, `pipe.get_submodule(…)` and the like.
ALL_OF_PIPE = re.compile(
    r"""\bpipe(["']\])?\s*(\(|\.(get_submodule|(named_)?(modules|children|parameters|buffers)|state_dict)\b)"""
)
SIZE = ("height", "width")
RESERVED = "model_id"  # key of a request's template inputs that chooses the template; not an argument of a template


@dataclass(frozen=True)
class TemplateCode:
    """The declarations of a template's `model.py`.

    Args:
        file: Path of the `model.py`.
        digest: SHA-256 of its text.
        model: Class of the network.
        config: Arguments of its constructor.
        weights: Files of weights; where several hold a tensor, the last one counts. Without files the network keeps the
            weights that its constructor makes.
        data_processor: Class whose instances turn a row's `template_inputs` into arguments of `process_inputs`.
    """

    file: Path
    digest: str
    model: type[nn.Module]
    config: Mapping[str, Any]
    weights: Sequence[Path]
    data_processor: type | None

    @property
    def size(self) -> tuple[str, ...]:
        """Those of `height` and `width`, the size of the sample, that `process_inputs` names."""
        return tuple(name for name in SIZE if name in inspect.signature(self.model.process_inputs).parameters)


def models_used(pipe: "BasePipeline", code: TemplateCode, method: str) -> list[str]:
    """Models of the pipeline that a method of a template may call: those whose names its code reaches.

    Code that calls the pipeline itself or asks it for modules by other means may call all of them.
    """
    function, built = getattr(code.model, method), pipe.built_models
    source = inspect.getsource(function)
    if not PIPE.search(source):
        return []
    if ALL_OF_PIPE.search(source):
        return sorted(built)
    classes = [type(getattr(pipe, name)) for name in built]
    _, attributes = code_version([function], [code.model, type(pipe), *classes])
    unnamed = pipe.in_iteration_models if "in_iteration_models" in attributes else ()  # as in `pipe.predict`
    return sorted(built & {*attributes, *unnamed})


# Importing a model.py -------------------------------------------------------------------------------------------------

__path__: list[str] = []  # Python imports submodules only of a module that has a __path__
MODULE = re.compile(re.escape(__name__) + r"\.template_(?P<digest>[0-9a-f]{16})_(?P<path>[0-9a-f]+)")


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not from __pycache__, which takes a file of equal size and modification second for the same.
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(MetaPathFinder):
    """Finds the submodules of this module, in any process that has imported it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        match = MODULE.fullmatch(fullname)
        if match is None:
            return None
        file = Path(os.fsdecode(bytes.fromhex(match["path"])))
        if not file.is_file() or module_name(file) != fullname:
            raise ImportError(f"{file} is not what it was when it was imported, or is gone; load the template again.")
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


sys.meta_path.append(_Finder())


def module_name(file: Path) -> str:
    """Name of the submodule that a file with its present content is imported as."""
    return f"{__name__}.template_{sha256(file.read_bytes()).hexdigest()[:16]}_{os.fsencode(file.absolute()).hex()}"


def import_code(file: Path) -> ModuleType:
    """Import a file as a module; a file that was imported before and has not changed is not run again.

    Raises:
        ValueError: The file raises an error; the message names the line.
    """
    with errors_of(file, "cannot be imported"):
        return import_module(module_name(file))


@contextmanager
def errors_of(file: Path, what: str) -> Iterator[None]:
    """Inside, errors of a template's code become a ValueError that names the file, its line, and `what` failed."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        place = f", line {line}" if line else ""
        raise ValueError(f"{file}{place}: {what}: {type(error).__name__}: {error}") from error


# Reading its declarations ---------------------------------------------------------------------------------------------


def read_code(folder: Path) -> TemplateCode:
    """Import the `model.py` of a folder and check its declarations.

    Raises:
        FileNotFoundError: The folder has no `model.py`, or a file of weights that it names does not exist.
        ValueError: It cannot be imported, or a declaration is wrong.
    """
    file = folder.absolute() / CODE
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; a template's folder holds a {CODE} with TEMPLATE_MODEL.")
    module = import_code(file)
    model, config = getattr(module, "TEMPLATE_MODEL", None), getattr(module, "TEMPLATE_MODEL_CONFIG", None) or {}
    _check_model(model, file)
    _check_config(config, model, file)
    return TemplateCode(
        file=file,
        digest=sha256(file.read_bytes()).hexdigest(),
        model=model,
        config=config,
        weights=_weights(getattr(module, "TEMPLATE_MODEL_PATH", None), file),
        data_processor=_data_processor(getattr(module, "TEMPLATE_DATA_PROCESSOR", None), file),
    )


def _check_model(model: Any, file: Path) -> None:
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise ValueError(f"{file}: TEMPLATE_MODEL is {model!r}, expected a class that extends torch.nn.Module.")
    for name in ("process_inputs", "forward"):
        method = getattr(model, name, None)
        parameters = inspect.signature(method).parameters if callable(method) else {}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            found = f"takes ({', '.join(parameters)})" if callable(method) else "is not there"
            raise ValueError(f"{file}: {model.__name__}.{name} {found}; expected a method that takes **kwargs.")
        if RESERVED in parameters:
            raise ValueError(f"{file}: {model.__name__}.{name} takes {RESERVED}, which is reserved; rename it.")


def _check_config(config: Any, model: type, file: Path) -> None:
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{file}: TEMPLATE_MODEL_CONFIG is {config!r}, expected a dict of {model.__name__}'s arguments."
        )
    try:
        inspect.signature(model).bind(**config)
    except TypeError as error:
        raise ValueError(
            f"{file}: TEMPLATE_MODEL_CONFIG {dict(config)} does not fit {model.__name__}: {error}"
        ) from error


def _weights(names: Any, file: Path) -> list[Path]:
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: TEMPLATE_MODEL_PATH is {names!r}, expected a file name, a list of them, or None.")
    files = [file.parent / name for name in names]
    for path in files:
        refuse_pickle(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found, which TEMPLATE_MODEL_PATH in {file} names; put the trained file there under that "
                "name, or set TEMPLATE_MODEL_PATH = None to start from random weights."
            )
    return files


def _data_processor(processor: Any, file: Path) -> type | None:
    callable_class = isinstance(processor, type) and any("__call__" in vars(base) for base in processor.__mro__)
    if processor is not None and not callable_class:
        raise ValueError(f"{file}: TEMPLATE_DATA_PROCESSOR is {processor!r}, expected a class with __call__, or None.")
    return processor
