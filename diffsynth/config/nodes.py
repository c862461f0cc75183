"""Checks configuration nodes against the signatures of their targets, and builds objects from them."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from ..core.masking import is_masked
from ..core.ranges import FractionBelowOne, LearningRate, NonNegativeFloat, NonNegativeInt, expected, is_number
from .moved import up_to_date
from .other_trainers import spelled_here

SCALARS = (int, float, bool, str, type(None))
# Of parameters of libraries' optimizers and schedules, whose own annotations have no ranges, or are absent.
NODES_OF_LIBRARIES = ("optimizer", "lr_scheduler")
OF_LIBRARIES = {
    "lr": LearningRate,
    "betas": tuple[FractionBelowOne, FractionBelowOne],
    "eps": NonNegativeFloat,
    "weight_decay": NonNegativeFloat,
    "num_warmup_steps": NonNegativeInt,
    "num_decay_steps": NonNegativeInt,
    "warmup_steps": NonNegativeInt,
}


class ConfigError(ValueError):
    """The configuration has a mistake; the message says where, what was expected, and what to type."""


def check(cfg: DictConfig, entry: Callable) -> None:
    """Check every node of a configuration against the signature of its `_target_`, and the top level against `entry`'s.

    Raises:
        ConfigError: A key is unknown or missing, a value has the wrong type, or a target does not exist.
    """
    try:
        _check(up_to_date(cfg), entry)
    except InterpolationResolutionError as error:  # such as a model without `training`, which other nodes refer to
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error


def _check(cfg: DictConfig, entry: Callable) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=… on the command line.")
    _check_node(cfg, entry, "")
    objects = [name for name, hint in type_hints(entry).items() if hint is Any]
    for name in objects:
        if isinstance(cfg.get(name), DictConfig) and cfg[name] and "_target_" not in cfg[name]:
            raise ConfigError(
                f"{name} has no _target_, so that its keys ({', '.join(cfg[name])}) have no effect: choose another "
                f"option of {name}, or remove `none` from {name}=[…]."
            )


def _check_node(node: DictConfig, target: Callable, path: str) -> None:
    parameters = inspect.signature(target).parameters
    hints = type_hints(target)
    if path.endswith(NODES_OF_LIBRARIES) and not target.__module__.startswith("diffsynth."):
        hints |= OF_LIBRARIES
    for key in node:
        where = f"{path}.{key}".lstrip(".")
        if key.startswith("_") or (not path and key == "hydra"):
            continue
        if key not in parameters:
            raise ConfigError(_unknown(where, key, parameters, target))
        _check_value(node[key], hints.get(key, Any), where)
    absent = [name for name, parameter in parameters.items() if _is_required(parameter) and name not in node]
    if absent and not node.get("_partial_"):
        key = f"{path}.{absent[0]}".lstrip(".")
        user, file = (f", and {_name(target)} requires it", path) if path else ("", "the experiment")
        raise ConfigError(f"{key} is missing{user}: add `{absent[0]}: …` to the YAML file of {file}.")


def _is_required(parameter: inspect.Parameter) -> bool:
    is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not is_variadic


def _check_value(value: Any, hint: Any, where: str) -> None:
    if isinstance(value, str) and is_masked(value):
        raise ConfigError(
            f"{where} is {value!r}, whose credentials were masked when the run was saved; set {where}=… to the whole "
            "URL, best with the secret from the environment, as ${oc.env:NAME}."
        )
    if isinstance(value, DictConfig) and "_target_" in value:
        _check_node(value, locate(value["_target_"], where), where)
    elif isinstance(value, DictConfig):
        for key in value:
            _check_value(value[key], hint_of_items(hint, (dict, Mapping)), f"{where}.{key}")
    elif isinstance(value, ListConfig):
        for index, item in enumerate(value):
            _check_value(item, hint_of_items(hint, (list, tuple, Sequence), index), f"{where}[{index}]")
    if not _fits(value, hint):
        if isinstance(value, DictConfig) and _may_be_built(hint):
            raise ConfigError(
                f"{where} has no _target_, so that its keys ({', '.join(value)}) build nothing; expected a node that "
                f"builds {expected(hint)}: choose an option that sets it, or leave these keys out."
            )
        meant = _meant(value, hint)
        typed = "." if meant is None else f"; type {where}={meant}"
        raise ConfigError(f"{where} is {value!r} ({_kind(value)}); expected {expected(hint, value)}{typed}")


def _may_be_built(hint: Any) -> bool:
    """Whether an annotation allows more than numbers and texts."""
    if typing.get_origin(hint) is Annotated:
        return _may_be_built(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_may_be_built, typing.get_args(hint)))
    return hint not in SCALARS


def _meant(value: Any, hint: Any) -> int | str | None:
    """Return the value that may be meant: the integer for 1e3, a float to YAML, or the nearest of a choice's names."""
    if isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
        return int(value)
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is typing.Literal]
    names = [name for kind in kinds for name in typing.get_args(kind) if isinstance(name, str)]
    return next(iter(difflib.get_close_matches(str(value), names, 1)), None)


def _kind(value: Any) -> str:
    """Return what the type of a value is called in YAML."""
    return {DictConfig: "mapping", ListConfig: "list"}.get(type(value), type(value).__name__)


def hint_of_items(hint: Any, kinds: tuple[type, ...], index: int = 0) -> Any:
    """Return the annotation of the values of a mapping or an item of a sequence: `T` of `Sequence[T] | None`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    found = [option for option in options if typing.get_origin(option) in kinds]
    items = typing.get_args(found[0]) if len(found) == 1 else ()
    if items and typing.get_origin(found[0]) is tuple and Ellipsis not in items:
        return items[index] if index < len(items) else Any
    return next((item for item in reversed(items) if item is not Ellipsis), Any)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may be passed to a parameter annotated with `hint`; an unknown annotation allows every value."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is Annotated:
        kind, *ranges = typing.get_args(hint)
        return _fits(value, kind) and all(value in each for each in ranges)
    if hint in (int, float):
        return is_number(value, hint)
    if hint in SCALARS:
        return isinstance(value, hint)
    if origin in (list, Sequence, tuple):
        is_list = isinstance(value, (ListConfig, list))  # resolvers return plain lists
        items = typing.get_args(hint)
        return is_list and (origin is not tuple or Ellipsis in items or len(value) == len(items))
    if origin in (dict, Mapping):
        return isinstance(value, DictConfig)
    if not inspect.isclass(hint) or hint is object:
        return True
    if isinstance(value, DictConfig):
        return "_target_" in value or issubclass(hint, (dict, Mapping))
    # A class or protocol: a node may build its object, but a string or number is never one.
    return not isinstance(value, SCALARS)


def _unknown(where: str, key: str, known: Mapping, target: Callable) -> str:
    nearest = difflib.get_close_matches(key, known, 1)
    parent = where.removesuffix(key)
    typed = spelled_here(key, "", known) if not (parent or nearest) else []
    known_here = f"type {' '.join(typed)}" if typed else f"there are {', '.join(sorted(known))}."
    hint = f"did you mean {parent}{nearest[0]}?" if nearest else known_here
    return f"{where}: {f'{_name(target)} has ' if parent else ''}no such key {key!r}; {hint}"


def locate(target: str, where: str) -> Callable:
    """Return the class or function of a dotted name.

    Raises:
        ConfigError: It cannot be imported, or is something else.
        OSError: The operating system refuses something while it is imported.
    """
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except ImportError as error:
        if getattr(error.__cause__, "errno", None) is not None:  # of a full disk, say; the name is right
            raise error.__cause__ from None
        reason = f"{error.__cause__ or error}.{_extra(target)}"
        raise ConfigError(f"{where}._target_ is {target!r}, which cannot be imported: {reason}") from error
    if not callable(found):
        raise ConfigError(f"{where}._target_ is {target!r}, a {type(found).__name__}; expected a class or function.")
    return found


def _extra(target: str) -> str:
    extras = {"bitsandbytes": "optimizers", "prodigyopt": "optimizers", "schedulefree": "optimizers"}
    extra = extras.get(target.split(".")[0])
    return f' Install it with: pip install "diffsynth-hydra[{extra}]"' if extra else ""


def type_hints(target: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError, AttributeError):  # an annotation exists only for type checkers
        return {}


def _name(target: Callable) -> str:
    return getattr(target, "__qualname__", str(target))


def build(cfg: DictConfig) -> dict[str, Any]:
    """Return the top level of a checked configuration, its nodes built into objects; omit empty nodes (`lora=none`).

    Raises:
        ConfigError: A constructor raises a ValueError or OSError; the message names the node.
    """
    # A copy, because Hydra resolves in place the nodes that others refer to.
    resolved = OmegaConf.create(OmegaConf.to_container(up_to_date(cfg), resolve=True))
    nodes = {key: value for key, value in resolved.items() if value != {}}
    return {key: _build_node(node) if _is_node(node) else node for key, node in nodes.items()}


def _build_node(node: DictConfig | ListConfig) -> Any:
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, (ValueError, OSError)):
            raise
        where = str(error).rpartition("full_key: ")[2]
        raise ConfigError(f"{where}: {error.__cause__}") from error


def _is_node(value: Any) -> bool:
    return isinstance(value, (DictConfig, ListConfig))
