"""Explains in one line why Hydra cannot compose a configuration, and what to type instead."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from .choices import flat
from .help import SHARED_PREFIX, option_names
from .other_trainers import NOTES, not_needed, spelled_here
from .script import compose_choices, conf, is_key, script

NEAR = 0.6  # likeness from which a name may be the one that was meant; difflib's default
# A file or folder where the name of an option is expected: what it may be, and what to type before its path.
OWN_FILES = {
    "dataset": ("images of your own", "dataset=image_folder dataset.path="),
    "lora": ("an adapter to go on from", "lora.checkpoint="),
    "model": ("weights of your own", "model=… model.dit.path="),
}


def explain(error: ConfigCompositionException | OverrideParseException) -> str:
    """Return what is wrong with the command line, and what to type instead."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error.override)
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").partition("/")
        if option and group != "hydra" and (conf() / group).is_dir():  # groups of Hydra's own are not all in conf/
            return _explain_option(group, option)
    if message.startswith("Ambiguous value for argument '"):
        return _explain_comma(message.splitlines()[0].partition("'")[2].removesuffix("'"))
    if message.startswith("Could not override '"):
        return explain_key(message.split("'")[1], error.__cause__)
    if message.startswith("Error merging override "):
        return _explain_merging(message.removeprefix("Error merging override "), str(error.__cause__))
    if message.startswith("Could not append to config. An item is already at '"):
        return _explain_append(message.split("'")[1])
    return f"{message}\n{error.__cause__ or ''}".strip()


def _explain_append(key: str) -> str:
    typed = in_shell(f"{key}={value_of(key)}")
    return f"+{key}: + adds a key that is not there, and {key} is; type {typed}"


def _explain_merging(override: str, reason: str) -> str:
    if "${" not in override:
        return f"{override}: {reason.splitlines()[0]}"
    return f"{override}: ${{ begins a reference to another key, such as ${{name}}; leave out its brace, or close it"


def _explain_unreadable(override: str) -> str:
    key, _, value = override.lstrip("+~").partition("=")
    if (conf() / key).is_dir():
        return _explain_option(key, value)
    if not is_key(key, compose_choices(sys.argv[1:])):
        return explain_key(key)
    return (
        f"{key}={value}: expected a number, true, false, null, a list such as [a,b], or a mapping such as {{a: 1}}"
        + ("" if _is_number(key) else f"; for a text with special characters type {_quoted(key, value)}")
    )


def _explain_comma(override: str) -> str:
    key, _, value = override.lstrip("+").partition("=")
    is_group, config = (conf() / key).is_dir(), compose_choices(sys.argv[1:])
    if not is_group and not is_key(key, config):
        return explain_key(key)
    listed, jobs = f'"{key}=[{value}]"', f"one run per choice type -m {in_shell(f'{key}={value}')}"
    if is_group:
        return f"{override}: a comma separates choices; for {jobs}, for all of them in one run {listed}"
    if _is_number(key):
        return f"{override}: {key} is one number; for {jobs}"
    if isinstance(OmegaConf.select(config, key), ListConfig):
        text = in_shell(f'{key}=["{value}"]')
        return f"{override}: {key} is a list; type {listed if _are_numbers(value) else text}"
    return f"{override}: a comma separates choices; for {jobs}, for a text {_quoted(key, value)}, for a list {listed}"


def _are_numbers(value: str) -> bool:
    return re.fullmatch(r"[\d.e+,\s-]*", value) is not None


def _is_number(key: str) -> bool:
    return isinstance(OmegaConf.select(compose_choices(sys.argv[1:]), key), int | float)


def _quoted(key: str, value: str) -> str:
    """The override as a shell and Hydra both take it."""
    escaped = value.replace("'", "\\'")
    return f"\"{key}='{escaped}'\""


def in_shell(word: str) -> str:
    """Return a word as one types it in a shell: in quotes if the shell would split or change it."""
    if '"' in word and "'" not in word:
        return f"'{word}'"
    return f'"{word}"' if re.search(r"[\s'()\[\]{}|&;<>*?#]", word) else word


def _explain_option(group: str, option: str) -> str:
    options = sorted(option_names(group), key=lambda name: -_likeness(option, name))
    near = _near(group, option)
    own = OWN_FILES.get(group) if not near or Path(option).exists() else None
    parts = [_guess([f"{group}={name}" for name in near])] if near else []
    parts += [f"for {own[0]} type {own[1]}{in_shell(option)};"] if own else []
    return f"{group}={option}: no such option; {' '.join([*parts, _listed(options)])}"


def _near(group: str, option: str) -> list[str]:
    """Return at most three options that may be meant by a name, the nearest first; one if it is the same word."""
    likeness = {name: _likeness(option, name) for name in option_names(group)}
    near = sorted((name for name in likeness if likeness[name] >= NEAR), key=lambda name: -likeness[name])
    return near[:1] if near and likeness[near[0]] == 1 else near[:3]


def _likeness(typed: str, name: str) -> float:
    """Return how near a name is, in [0, 1], by its letters and digits; an owner or folder may stand before it."""
    pairs = [(typed, name), (typed.rpartition("/")[2], name.rpartition("/")[2])]
    plain = [[re.sub("[^a-z0-9]+", "_", text.lower()) for text in pair] for pair in pairs]
    is_part = len(plain[0][0]) > 2 and plain[0][0] in plain[0][1]
    return max(NEAR * is_part, *(difflib.SequenceMatcher(None, *pair).ratio() for pair in plain))


def explain_key(path: str, cause: BaseException | None = None) -> str:
    """Return which key is meant by one that is not there."""
    config = compose_choices([word for word in sys.argv[1:] if word.split("=")[0] != path])
    if path not in set(config) and (known := known_here(path, value_of(path), config)):
        return f"{path}: no such key {path!r}; {known}"
    if (conf() / path).is_dir():
        return _explain_group(path, config.hydra.runtime.choices)
    if (group := path.partition(".")[0]) != path and (conf() / group).is_dir() and not config.get(group, True):
        return f"{path}: the chosen option of {group} has no keys; {_another_option(group, config)}"
    if OmegaConf.select(config, path) is not None and (inner := getattr(cause, "full_key", path)) != path:
        path = inner  # the value is a dict, and one of its keys is wrong
    parent, _, key = path.rpartition(".")
    while parent and OmegaConf.select(config, parent) is None:  # go up to the first part that does not exist
        path, (parent, _, key) = parent, parent.rpartition(".")
    return f"{path}: no such key {key!r}; {_known_key(config, parent, key)}"


def _another_option(group: str, config: DictConfig) -> str:
    """Say which option to choose instead: the default if it is not the one chosen, else another."""
    chosen = config.hydra.runtime.choices.get(group)
    default = compose_choices([]).hydra.runtime.choices.get(group)
    other = default if default != chosen else next(name for name in reversed(option_names(group)) if name != chosen)
    return f"choose one that has, such as {group}={other}; python {script()}.py {group}={other} --help lists its keys"


def known_here(name: str, value: str, config: DictConfig) -> str:
    """Return what to do about a key of another trainer; an empty text if none of this script's keys is its like."""
    if reason := not_needed(name):
        return f"not needed: {reason}"
    words = [_chosen(word, value) for word in spelled_here(name, value, set(config))]
    note = NOTES.get(name.replace("-", "_"), "").replace("{}", value or "…")
    return f"type {' '.join(map(in_shell, words))}{note}" if words else ""


def _chosen(word: str, value: str) -> str:
    """Return a word with the option in place of its `…` that is nearest to the value in another trainer's spelling."""
    group, _, option = word.partition("=")
    near = _near(group, value.partition(":")[0]) if option == "…" and value and (conf() / group).is_dir() else []
    return f"{group}={near[0]}" if near else word


def value_of(key: str) -> str:
    """Return what the command line sets a key to; an empty text if it does not."""
    assignments = [argument.lstrip("+").partition("=") for argument in sys.argv[1:]]
    return next((value for name, _, value in assignments if name == key), "")


def _known_key(config: DictConfig, parent: str, key: str) -> str:
    """Say which key may be meant: the nearest one below the same parent, else keys of this name elsewhere."""
    siblings = (OmegaConf.select(config, parent) if parent else config) or {}
    prefix = f"{parent}." if parent else ""
    if nearest := difflib.get_close_matches(key, siblings, 1):
        return _guess([f"{prefix}{nearest[0]}"])
    if known := known_here(key, value_of(f"{prefix}{key}"), config):
        return known
    elsewhere = [name for name, _ in flat(OmegaConf.to_container(config)) if name.endswith(f".{key}")]
    shortest_first = sorted((name for name in elsewhere if not name.startswith("hydra.")), key=lambda n: n.count("."))
    return _guess(shortest_first[:3]) if shortest_first else _listed(sorted(set(siblings) - {"hydra"}))


MOST_LISTED = 15  # names in an answer; those nearest to what was typed come first


def _guess(names: Sequence[str]) -> str:
    return f"did you mean {' or '.join(names)}?"


def _listed(names: Sequence[str]) -> str:
    own = [name for name in names if not name.startswith(SHARED_PREFIX)]
    hidden = f", and {len(own) - MOST_LISTED} more" if len(own) > MOST_LISTED + 1 else ""
    return f"there are {', '.join(own[:MOST_LISTED] if hidden else own)}{hidden}."


def _explain_group(group: str, choices: Mapping[str, str]) -> str:
    """Return why no option of an existing group can be chosen: only other tasks have the group, or other scripts."""
    tasks = conf() / "task"
    with_group = [file for file in sorted(tasks.rglob("*.yaml")) if f"- /{group}: " in file.read_text(encoding="utf-8")]
    if not with_group or "task" not in choices:
        groups = sorted(name for name in choices if "hydra/" not in name)
        return f"{group}: {script()}.py has no such group; it has {', '.join(groups)}."
    names = ", ".join(file.relative_to(tasks).with_suffix("").as_posix() for file in with_group)
    return f"{group}: task={choices['task']} has no group {group}; these tasks have it: {names}."
