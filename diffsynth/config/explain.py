"""Explains in one line why Hydra cannot compose a configuration, and what to type instead."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from .help import SHARED_PREFIX
from .script import compose, conf, script


def explain(error: ConfigCompositionException | OverrideParseException) -> str:
    """Return what is wrong with the command line, and the nearest name that exists."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error.override, message.splitlines()[0])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(*error.missing_cfg_file.split("/", 1))
    if message.startswith("Ambiguous value for argument '"):
        return _explain_comma(message.splitlines()[0].partition("'")[2].rstrip("'"))
    if message.startswith("Could not override '"):
        return _explain_key(message.split("'")[1], error.__cause__)
    return f"{message}\n{error.__cause__ or ''}".strip()


def _explain_unreadable(override: str, reason: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{key}: expected key=value, without spaces around =, such as {key}=…"
    return f"{override}: {reason}; put text with special characters into two pairs of quotes: \"{key}='{value}'\""


def _explain_comma(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"{override}: a comma separates choices; for a text with commas type \"{key}='{value}'\", for a list "
        f'"{key}=[{value}]", for one run per choice add -m.'
    )


def _explain_option(group: str, option: str = "") -> str:
    names = [path.relative_to(conf() / group).with_suffix("").as_posix() for path in (conf() / group).rglob("*.yaml")]
    options = sorted(name for name in names if not name.startswith(SHARED_PREFIX))
    return f"{group}={option}: no such option; {_nearest(option, options)}"


def _explain_key(path: str, cause: BaseException | None) -> str:
    config = _chosen_groups(other_than=path)
    if (conf() / path).is_dir():
        return _explain_group(path, config.hydra.runtime.choices)
    if OmegaConf.select(config, path) is not None and (inner := getattr(cause, "full_key", path)) != path:
        return _explain_key(inner, None)  # the value is a dict, and one of its keys is wrong
    parent, _, key = path.rpartition(".")
    while parent and OmegaConf.select(config, parent) is None:  # go up to the first part that does not exist
        path, (parent, _, key) = parent, parent.rpartition(".")
    siblings = (OmegaConf.select(config, parent) if parent else config) or ()
    prefix = f"{parent}." if parent else ""
    nearest = difflib.get_close_matches(key, siblings, 1)
    elsewhere = sorted((name for name in _leaves(config) if name.endswith(f".{key}")), key=lambda name: name.count("."))
    known = [f"{prefix}{name}" for name in nearest] or elsewhere or sorted(siblings)
    return f"{path}: no such key {key!r}; {_one_of(known, is_guess=bool(nearest or elsewhere))}"


def _leaves(config: Mapping, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, without those of Hydra."""
    for key in config:
        if OmegaConf.is_dict(config._get_node(key)) and key != "hydra":
            yield from _leaves(config._get_node(key), f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, 1)
    return _one_of(nearest or list(known), is_guess=bool(nearest))


def _one_of(names: list[str], is_guess: bool) -> str:
    public = [name for name in names if not name.startswith((SHARED_PREFIX, "hydra"))]
    return f"did you mean {' or '.join(public[:3])}?" if is_guess else f"there are {', '.join(public)}."


def _explain_group(group: str, choices: Mapping[str, str]) -> str:
    """Return why no option of an existing group can be chosen: only other tasks have the group, or other scripts."""
    tasks = conf() / "task"
    with_group = [file for file in sorted(tasks.rglob("*.yaml")) if f"- /{group}: " in file.read_text(encoding="utf-8")]
    if not with_group or "task" not in choices:
        groups = sorted(name for name in choices if "hydra/" not in name)
        return f"{group}: {script()}.py has no such group; it has {', '.join(groups)}."
    names = ", ".join(file.relative_to(tasks).with_suffix("").as_posix() for file in with_group)
    return f"{group}: task={choices['task']} has no group {group}; these tasks have it: {names}."


def _chosen_groups(other_than: str) -> DictConfig:
    """Compose the configuration with the groups that the command line chooses, without its other overrides."""
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and argument.split("=")[0] != other_than]
    chosen = [override for override in overrides if (conf() / override.split("=")[0]).is_dir()]
    try:
        return compose(chosen, return_hydra_config=True)
    except ConfigCompositionException:  # a sweep over options, or an option in --config-dir: take the defaults
        return compose([], return_hydra_config=True)
