"""Explains in one line why Hydra cannot compose a configuration, and what to type instead."""

import difflib
import sys
from collections.abc import Mapping, Sequence

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from .choices import flat
from .help import SHARED_PREFIX, option_names
from .script import compose, conf, script


def explain(error: ConfigCompositionException | OverrideParseException) -> str:
    """Return what is wrong with the command line, and the nearest name that exists."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error.override, message.splitlines()[0])
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").partition("/")
        if option and group != "hydra" and (conf() / group).is_dir():  # groups of Hydra's own are not all in conf/
            return _explain_option(group, option)
    if message.startswith("Ambiguous value for argument '"):
        return _explain_comma(message.splitlines()[0].partition("'")[2].removesuffix("'"))
    if message.startswith("Could not override '"):
        return _explain_key(message.split("'")[1], error.__cause__)
    return f"{message}\n{error.__cause__ or ''}".strip()


def _explain_unreadable(override: str, reason: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{key}: expected key=value, without spaces around =, such as {key}=…"
    return f"{override}: {reason}; put text with special characters into two pairs of quotes: {_quoted(key, value)}"


def _explain_comma(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"{override}: a comma separates choices; for a text with commas type {_quoted(key, value)}, for a list "
        f'"{key}=[{value}]", for one run per choice add -m.'
    )


def _quoted(key: str, value: str) -> str:
    """The override as a shell and Hydra both take it."""
    escaped = value.replace("'", "\\'")
    return f"\"{key}='{escaped}'\""


def _explain_option(group: str, option: str) -> str:
    options = option_names(group)
    nearest = difflib.get_close_matches(option, options, 1)
    return f"{group}={option}: no such option; {_guess([f'{group}={nearest[0]}']) if nearest else _listed(options)}"


def _explain_key(path: str, cause: BaseException | None) -> str:
    config = _chosen_groups(other_than=path)
    if (conf() / path).is_dir():
        return _explain_group(path, config.hydra.runtime.choices)
    if OmegaConf.select(config, path) is not None and (inner := getattr(cause, "full_key", path)) != path:
        path = inner  # the value is a dict, and one of its keys is wrong
    parent, _, key = path.rpartition(".")
    while parent and OmegaConf.select(config, parent) is None:  # go up to the first part that does not exist
        path, (parent, _, key) = parent, parent.rpartition(".")
    return f"{path}: no such key {key!r}; {_known_key(config, parent, key)}"


def _known_key(config: DictConfig, parent: str, key: str) -> str:
    """Say which key may be meant: the nearest one below the same parent, else keys of this name elsewhere."""
    siblings = (OmegaConf.select(config, parent) if parent else config) or {}
    prefix = f"{parent}." if parent else ""
    if nearest := difflib.get_close_matches(key, siblings, 1):
        return _guess([f"{prefix}{nearest[0]}"])
    elsewhere = [name for name, _ in flat(OmegaConf.to_container(config)) if name.endswith(f".{key}")]
    shortest_first = sorted((name for name in elsewhere if not name.startswith("hydra.")), key=lambda n: n.count("."))
    return _guess(shortest_first[:3]) if shortest_first else _listed(sorted(set(siblings) - {"hydra"}))


def _guess(names: Sequence[str]) -> str:
    return f"did you mean {' or '.join(names)}?"


def _listed(names: Sequence[str]) -> str:
    return f"there are {', '.join(name for name in names if not name.startswith(SHARED_PREFIX))}."


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
