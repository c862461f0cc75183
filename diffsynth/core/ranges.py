"""Ranges of numbers, declared in the annotations of constructors, such as `Annotated[int, at_least(1)]`.

`config.check` holds a configuration to them, and `check_fields` an object that Python code builds.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

LARGEST = 2**63 - 1  # of the whole numbers of 64 bits, which torch, numpy and files have


@dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Args:
        low, high: Its ends.
        brackets: How the ends belong to it: `[` and `]` include an end, `(` and `)` leave it out.
    """

    low: float = -math.inf
    high: float = math.inf
    brackets: str = "[]"

    def __contains__(self, number: float) -> bool:
        above = number > self.low or (number == self.low and self.brackets[0] == "[")
        below = number < self.high or (number == self.high and self.brackets[1] == "]")
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f" of at least {self.low}" if self.brackets[0] == "[" else f" above {self.low}"
        if self.low == -math.inf:
            return f" of at most {self.high}" if self.brackets[1] == "]" else f" below {self.high}"
        return f" in {self.brackets[0]}{self.low}, {self.high}{self.brackets[1]}"


def at_least(low: float) -> Range:
    """The numbers from `low` on."""
    return Range(low)


def more_than(low: float) -> Range:
    """The numbers above `low`."""
    return Range(low, brackets="(]")


def within(low: float, high: float, brackets: str = "[]") -> Range:
    """The numbers from `low` to `high`; see `Range`."""
    return Range(low, high, brackets)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, more_than(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Probability = Annotated[float, within(0, 1)]
FractionBelowOne = Annotated[float, within(0, 1, "[)")]  # such as a decay, or a rate of dropping that leaves something
NonZero = Annotated[float, more_than(0)] | Annotated[float, Range(high=0, brackets="[)")]
PositiveFraction = Annotated[float, within(0, 1, "(]")]  # such as a noise level, or an exponent
Seed = Annotated[int, within(0, LARGEST)]
# Pixels of a side; a JPEG has at most 65,535 (ITU-T T.81, B.2.2).
Side = Annotated[int, within(1, 65_535)]
Pixels = Annotated[int, within(1, 65_535**2)]
# The upper ends below are guesses: ten times what anybody needs, and few enough not to fill the memory with numbers.
BatchSize = Annotated[int, within(1, 1_000_000)]
Repeat = Annotated[int, within(1, 1_000_000_000)]
SamplingSteps = Annotated[int, within(1, 10_000)]
Tokens = Annotated[int, within(1, 1_000_000)]
Workers = Annotated[int, within(0, 1024)]
Width = Annotated[int, within(1, 65_536)]
LearningRate = Annotated[float, within(0, 100)]


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is a whole number of 64 bits (`kind` int), or a finite number (`kind` float); True is neither."""
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return False
    return abs(value) <= LARGEST if kind is int else math.isfinite(value)


def allows(hint: Any, value: Any) -> bool:
    """Whether a parameter annotated with `hint` may be this value; an annotation of no number allows every value."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(allows(option, value) for option in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return allows(kind, value) and all(value in each for each in ranges)
    if get_origin(hint) is Sequence and isinstance(value, Real):
        return False
    if get_origin(hint) is Sequence and isinstance(value, Sequence):
        return all(allows(item_hint, item) for item in value for item_hint in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return is_number(value, hint)
    return value is None if hint is type(None) else True


def expected(hint: Any, value: Any = None) -> str:
    """What a parameter annotated with `hint` takes, in words; `value` is what was found instead."""
    if isinstance(value, Real) and math.isinf(value):
        return "a finite number"
    if isinstance(value, Integral) and abs(value) > LARGEST:
        return f"a number of at most {LARGEST}"
    if hint in (int, float) and isinstance(value, Sequence) and not isinstance(value, str):
        return f"one {'whole ' * (hint is int)}number for all"
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        words = [*map(expected, options), *(["null"] if type(None) in get_args(hint) else [])]
        return f"{', '.join(words[:-1])}{',' if ' ' in words[0] else ''} or {words[-1]}"
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return "".join(["a whole number" if kind is int else "a number", *map(str, ranges)])
    if get_origin(hint) is tuple and Ellipsis in get_args(hint):
        return expected(Sequence[get_args(hint)[0]])
    if get_origin(hint) is tuple and len(set(get_args(hint))) > 1:
        return f"a list of {len(get_args(hint))}: {', '.join(map(expected, get_args(hint)))}"
    if get_origin(hint) in (tuple, Sequence, Mapping) and get_args(hint):
        kind = {tuple: f"a list of {len(get_args(hint))}", Sequence: "a list", Mapping: "a mapping"}[get_origin(hint)]
        values = get_args(hint)[-1]
        return kind if values in (object, Any) else f"{kind}, each {expected(values)}"
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def check_fields(own: object, where: str = "") -> None:
    """Check the numbers of a dataclass object against the annotations of its fields.

    Args:
        where: What stands before the name of a field in the error, such as `lora.`.

    Raises:
        ValueError: A number is out of its range, or is none.
    """
    for field in fields(own):
        _check(field.type, getattr(own, field.name), where + field.name)


def check_arguments(function: Callable, where: str, **arguments: Any) -> None:
    """Check arguments of a function against its annotations; see `check_fields`."""
    for name, value in arguments.items():
        _check(function.__annotations__[name], value, where + name)


def _check(hint: Any, value: Any, name: str) -> None:
    if not allows(hint, value):
        raise ValueError(f"{name} is {value!r}; expected {expected(hint, value)}.")
