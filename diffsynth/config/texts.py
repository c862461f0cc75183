"""Puts values of text keys into quotes where Hydra's grammar would refuse or change them, so that they arrive as typed.

A text is most of what one types: a prompt with commas, an apostrophe, a folder named `a=b`. Which keys are text follows
from the annotations that `check` compares values with: `str`, `Path`, and lists of them.
"""

import os
import re
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .launch_with_signals import IS_SWEEP_JOB
from .nodes import ConfigError, hint_of_items, locate, type_hints
from .script import compose_choices, is_key

QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
ELEMENT = re.compile(rf"\s*({QUOTED}|\[(?:{QUOTED}|[^\]])*\]|[^,]*?)\s*(,|\Z)", re.DOTALL)
ASSIGNMENT = re.compile(r"(\+{0,2})([\w.-]+)=(.*)", re.DOTALL)
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)  # Hydra's functions of a sweep


class Texts(NamedTuple):
    """What text a key takes: one, a list of them, or both; and whether it takes a mapping or an object as well."""

    one: bool = False
    several: bool = False
    others: bool = False


def as_typed(arguments: Sequence[str], entry: Callable) -> list[str]:
    """Return a command line that Hydra reads as it is typed: flags first, then overrides with their texts in quotes.

    What is in quotes already stays as it is, and so do `null` and `${…}`; `~/` at the beginning is the home folder.
    In a list, and in a sweep (`-m`), a comma separates texts unless it is in quotes.

    Args:
        arguments: The words after the script's name; all are flags of Hydra or overrides.
        entry: The function or dataclass whose parameters are the top level of the configuration.

    Raises:
        ConfigError: A text in a list or sweep begins with a quote that is not closed, or is missing.
    """
    parsed, others = get_args_parser().parse_known_args(list(arguments))
    overrides = [*parsed.overrides, *others]  # argparse takes only those before the next flag
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    sweeps = parsed.multirun or "hydra.mode=MULTIRUN" in overrides
    return [*flags, *(_as_typed(override, entry, overrides, sweeps) for override in overrides)]


def _as_typed(override: str, entry: Callable, overrides: Sequence[str], sweeps: bool) -> str:
    match = ASSIGNMENT.fullmatch(override)
    if match is None or _is_read_as_typed(match[3]) or _is_escaped(match[3]):
        return override
    prefix, key, value = match.groups()
    texts = texts_of(key, entry, overrides)
    is_mapping = texts.others and isinstance(_read(value), dict)
    if not (texts.one or texts.several) or is_mapping or (sweeps and SWEEP.fullmatch(value)):
        return override
    jobs = _elements(value, key) if sweeps else [value]
    values = jobs if len(jobs) > 1 else [value]  # a single one keeps its blanks
    readable = ",".join(_readable(value, texts, key) for value in values)
    is_the_same = _read(readable) is not None and _read(readable) == _read(value)
    return override if is_the_same else f"{prefix}{key}={readable}"  # a sweep's folder hashes its overrides


def _readable(value: str, texts: Texts, key: str) -> str:
    """Return one value, or one element of a list, so that Hydra reads it as the text that is typed."""
    if texts.several and _is_list(value):
        inside = value[1:-1]
        elements = _elements(inside, key) if inside.strip() else []
        if "" in elements:
            raise ConfigError(f"{key}: {value:.99} has a comma without a text beside it; leave it out, or type ''.")
        return f"[{','.join(_readable(element, Texts(one=True), key) for element in elements)}]"
    value = str(Path(value).expanduser()) if value.startswith("~/") else value
    is_spelled_for_hydra = value == "null" or re.fullmatch(QUOTED, value, re.DOTALL) or _is_escaped(value)
    return (
        value
        if not texts.one or is_spelled_for_hydra or _is_read_as_typed(value)
        else QuotedString(value, Quote.single).with_quotes()
    )


def _is_read_as_typed(value: str) -> bool:
    """Whether Hydra reads a value as the very text; of a number or of blanks around a text it makes something else.

    Before the end of a list, the backslash at the end of a text would be one of the bracket.
    """
    return _read(value) == value and not value.startswith("~/") and not value.endswith("\\")


def _is_escaped(value: str) -> bool:
    """Whether all special characters of a value have a backslash before them, as Hydra writes the jobs of a sweep.

    Of a command line that is typed, a backslash is one of the text: tags are written so, `saber\\(fate\\)`.
    """
    if IS_SWEEP_JOB not in os.environ or "\\" not in value or _read(value) is None:
        return False
    return _parser().parse_override(f"key={value}").get_value_element_as_str() == value


def _read(value: str) -> Any:
    """Return what Hydra reads a value as; None if it cannot, or reads a sweep."""
    try:
        override = _parser().parse_override(f"key={value}")
    except HydraException:
        return None
    return None if override.is_sweep_override() else override.value()


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _is_list(value: str) -> bool:
    """Whether the bracket that opens a value is closed at its end; not so in `[red] cat, [blue] dog`."""
    if not (value.startswith("[") and value.endswith("]")):
        return False
    bare = re.sub(QUOTED, "", value, flags=re.DOTALL)
    depths = list(accumulate((character == "[") - (character == "]") for character in bare))
    return 0 not in depths[:-1]


def _elements(text: str, key: str) -> list[str]:
    """Split at commas, except those in quotes or in a list; a quote counts only where an element begins."""
    elements, position, separator = [], 0, ","
    while separator:
        match = ELEMENT.match(text, position)
        element, separator = match.groups()
        if element[:1] in ("'", '"') and not re.fullmatch(QUOTED, element, re.DOTALL):
            raise ConfigError(
                f"{key}: {element} begins with a quote that does not end it; put each whole text into quotes of the "
                f'other kind, such as \'["a cat, sitting","a dog"]\''
            )
        elements.append(element)
        position = match.end()
    return elements


def texts_of(key: str, entry: Callable, overrides: Sequence[str] = ()) -> Texts:
    """Return what text a dotted key takes, by its annotation.

    A nested key costs a composition (a third of a second, once) and the import of the class that it belongs to; a key
    whose value is a number, and one that is not there, cost no import.

    Args:
        key: The key.
        entry: The function or dataclass whose parameters are the top level of the configuration.
        overrides: The overrides beside it; the options that they choose decide which class a nested key belongs to.
    """
    *parents, last = key.split(".")
    config = compose_choices(overrides) if parents else OmegaConf.create()
    if parents and (isinstance(_value(config, key), (int, float)) or not is_key(key, config)):
        return Texts()
    node, hints = config, type_hints(entry)
    for name in parents:
        node, hints = _below(name, node, hints)
    return _texts(hints.get(last, Any))


def _below(name: str, node: DictConfig, hints: Mapping[str, Any]) -> tuple[DictConfig, Mapping[str, Any]]:
    """Return the node below a key, and the annotations of its own keys."""
    below = _value(node, name)
    if not isinstance(below, DictConfig):
        return OmegaConf.create(), {}
    if "_target_" in below:
        return below, type_hints(locate(below["_target_"], name))
    return below, defaultdict(lambda: hint_of_items(hints.get(name, Any), (dict, Mapping)))


def _value(node: DictConfig, key: str) -> Any:
    """Return the value of a key; None if there is none, or if it refers to one that is not there."""
    try:
        return OmegaConf.select(node, key)
    except OmegaConfBaseException:
        return None


def _texts(hint: Any) -> Texts:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if {int, float, bool} & set(members):  # Hydra decides which of the two a value is
        return Texts()
    lists = [member for member in members if typing.get_origin(member) in (list, tuple, Sequence)]
    of_text = [member for member in lists if set(typing.get_args(member)) <= {str, Path, ...}]
    others = set(members) - {str, Path, types.NoneType, *of_text}
    return Texts(bool({str, Path} & set(members)), bool(of_text), bool(others))
