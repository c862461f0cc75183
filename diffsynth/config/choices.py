"""Checks of the options on a command line and in its experiment, which the composed configuration no longer shows."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, takewhile
from pathlib import PurePosixPath
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from .nodes import ConfigError
from .script import conf, script

BASE = "base"  # name of the file that a group's options add to, if several of them may be chosen
RUNS_OF = {"plan": "train"}  # scripts that plan the runs of another script, and therefore take its experiments


def check_choices() -> None:
    """Check that no two chosen options of a group set one key to different values, as memory=[none,checkpointing] do.

    Raises:
        ConfigError: Two options do; the message names both, and the key.
    """
    config = HydraConfig.get()
    if not any("=[" in override or override.startswith("experiment=") for override in config.overrides.task):
        return  # no group can have two options; composing would take a third of a second
    loader, overrides = GlobalHydra.instance().config_loader(), [*config.overrides.hydra, *config.overrides.task]
    files = loader.compute_defaults_list(config.job.config_name, overrides, RunMode.RUN).defaults
    for group, options in options_of(files).items():
        for one, other in combinations(options, 2):
            _check_agreement(loader, group, one, other)
        if "none" in options and len(options) > 1:
            other = next(option for option in options if option != "none")
            raise ConfigError(f"{group}=none and {group}={other} contradict each other; choose one of the two.")


def options_of(files: Sequence[ResultDefault]) -> dict[str, list[str]]:
    """Return the chosen options of each group, without `base` and the files that options inherit from."""
    options = defaultdict(set)
    for file in files:
        path, parent = PurePosixPath(file.config_path or ""), PurePosixPath(file.parent or "")
        is_inherited = parent.parent == path.parent
        if not is_inherited and path.name != BASE:
            package = file.package or str(path.parent).replace("/", ".")  # some change the top level
            options[str(path.parent), package].add(path.name)
    return {group: sorted(names) for (group, _), names in options.items()}


def _check_agreement(loader: ConfigLoader, group: str, *options: str) -> None:
    files = (loader.repository.load_config(f"{group}/{option}").config for option in options)
    one, other = (dict(flat(OmegaConf.to_container(file))) for file in files)
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            raise ConfigError(
                f"{group}={options[0]} and {group}={options[1]} contradict each other: {group}.{key} is {one[key]} in "
                f"the first and {other[key]} in the second; choose one of the two."
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars and lists of nested settings with their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_arguments(arguments: Sequence[str]) -> None:
    """Check choices of groups, `experiment=` and `local=` among them, before the configuration is composed.

    Raises:
        ConfigError: A group is null, the experiment is another script's, or the local file does not exist.
    """
    for argument in arguments:
        group, _, names = argument.partition("=")
        if names == "null" and group and (conf() / group).is_dir():
            raise ConfigError(f"{group}=null names no option; leave it out, or see the options by --help.")
        check = {"experiment": _check_experiment, "local": _check_local}.get(group)
        for name in names.strip("[]").split(",") if check else ():  # a sweep names several
            check(name)


def _check_experiment(name: str) -> None:
    """Check that an experiment is one of this script; the comment at its top has the command that runs it."""
    file = conf() / "experiment" / f"{name}.yaml"
    head = "".join(takewhile(lambda line: line.startswith("#"), file.open(encoding="utf-8"))) if file.exists() else ""
    command = re.search(r"(\w+)\.py experiment=", head)
    if command and command[1] not in (script(), RUNS_OF.get(script())):
        is_planned = script() == "plan" and command[1] == "distill"
        planned = "; to plan a distillation, python plan.py task=distill/… dataset=prompts dataset.path=… cached=true"
        raise ConfigError(
            f"experiment={name} is an experiment of {command[1]}.py, not of {script()}.py; run python {command[1]}.py "
            f"experiment={name}{planned if is_planned else ''}"
        )


def _check_local(name: str) -> None:
    """Check that the file exists; Hydra would ignore a missing one, because the group is optional."""
    file = conf() / "local" / f"{name}.yaml"
    if not file.exists():
        raise ConfigError(f"local={name}: {file} does not exist; conf/local/README.md says what to write into it.")
