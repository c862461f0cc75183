"""A template's `model.py`: imported once, and checked before anything heavy is read.

Its modules are named by their file and its content, below this one, so that other processes find what pickles name.
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
from types import ModuleType
from typing import Any

from torch import nn

from ...core.loader import refuse_pickle

CODE = "model.py"
RESERVED = "model_id"  # tells templates from one another; no argument of theirs


@dataclass(frozen=True)
class TemplateCode:
    """What a template's `model.py` says.

    Args:
        file: Where it is.
        digest: SHA-256 of its text.
        model: Class of the network, and the `config` that it is built with.
        weights: Its files of weights, of which later ones win; none for a network as its constructor makes it.
        data_processor: Class of what makes arguments of `process_inputs` from a row's `template_inputs`.
    """

    file: Path
    digest: str
    model: type[nn.Module]
    config: Mapping[str, Any]
    weights: Sequence[Path]
    data_processor: type | None


# Importing it ---------------------------------------------------------------------------------------------------------

__path__: list[str] = []  # so that modules may be below this one
MODULE = re.compile(re.escape(__name__) + r"\.template_(?P<digest>[0-9a-f]{16})_(?P<path>[0-9a-f]+)")


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str):
        # Never from __pycache__, which goes by the file's size and second.
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(MetaPathFinder):
    """Finds the modules below this one, in any process that imports it."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        own = MODULE.fullmatch(fullname)
        if own is None:
            return None
        file = Path(os.fsdecode(bytes.fromhex(own["path"])))
        if not file.is_file() or module_name(file) != fullname:
            raise ImportError(f"{file} is not what it was, or gone; load the template anew.")
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


sys.meta_path.append(_Finder())


def module_name(file: Path) -> str:
    """Name of the module that a file, as it is now, is imported as."""
    return f"{__name__}.template_{sha256(file.read_bytes()).hexdigest()[:16]}_{os.fsencode(file.absolute()).hex()}"


def import_code(file: Path) -> ModuleType:
    """The module of a file, run once however often it is asked for.

    Raises:
        ValueError: It raises something; names the line.
    """
    with errors_of(file, "cannot be imported"):
        return import_module(module_name(file))


@contextmanager
def errors_of(file: Path, what: str) -> Iterator[None]:
    """Whatever a template's code raises inside, as a ValueError that names the file and its line."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        place = f", line {line}" if line else ""
        raise ValueError(f"{file}{place}: {what}: {type(error).__name__}: {error}") from error


# Reading it -----------------------------------------------------------------------------------------------------------


def read_code(folder: Path) -> TemplateCode:
    """What the `model.py` of a folder says.

    Raises:
        FileNotFoundError: There is none, or a file of weights that it names is not there.
        ValueError: It cannot be imported, or says something else than a template does.
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
