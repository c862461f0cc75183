"""What a command line and its experiment chose, where that cannot be seen in the configuration they compose."""

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

START = "base"  # the file of a group that its options add to
RUNS_OF = {"plan": "train"}  # scripts that plan runs of another, and so take its experiments


def check_choices() -> None:
    """Refuse options of one group that set a key to different values, such as memory=[none,checkpointing].

    Raises:
        ConfigError: Names both options and the key.
    """
    config = HydraConfig.get()
    if not any("=[" in word or word.startswith("experiment=") for word in config.overrides.task):
        return  # composing takes a third of a second
    loader, overrides = GlobalHydra.instance().config_loader(), [*config.overrides.hydra, *config.overrides.task]
    files = loader.compute_defaults_list(config.job.config_name, overrides, RunMode.RUN).defaults
    for group, options in options_of(files).items():
        for one, other in combinations(options, 2):
            _check_agreement(loader, group, one, other)


def options_of(files: Sequence[ResultDefault]) -> dict[str, list[str]]:
    """The options that were chosen of each group, without those that an option inherits and what all start from."""
    options = defaultdict(set)
    for file in files:
        path, parent = PurePosixPath(file.config_path or ""), PurePosixPath(file.parent or "")
        if parent.parent != path.parent and path.name != START:
            options[str(path.parent), file.package].add(path.name)
    return {group: sorted(names) for (group, _), names in options.items()}


def _check_agreement(loader: ConfigLoader, group: str, *options: str) -> None:
    files = (loader.repository.load_config(f"{group}/{option}").config for option in options)
    one, other = (dict(_flat(OmegaConf.to_container(file))) for file in files)
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            raise ConfigError(
                f"{group}={options[0]} and {group}={options[1]} contradict each other: {group}.{key} is {one[key]} in "
                f"one, {other[key]} in the other; choose one of the two."
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values within values by their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_words(words: Sequence[str]) -> None:
    """Refuse, before anything is composed, an experiment of another script and a local file that is not there.

    Raises:
        ConfigError: Names the script or the file.
    """
    for word in words:
        group, _, names = word.partition("=")
        check = {"experiment": _check_experiment, "local": _check_local}.get(group)
        for name in names.split(",") if check else ():  # a sweep names several
            check(name)


def _check_experiment(name: str) -> None:
    """Refuse an experiment of another script, which a comment at its top names by its command."""
    file = conf() / "experiment" / f"{name}.yaml"
    head = "".join(takewhile(lambda line: line.startswith("#"), file.open(encoding="utf-8"))) if file.exists() else ""
    made_by = re.search(r"(\w+)\.py experiment=", head)
    if made_by and made_by[1] not in (script(), RUNS_OF.get(script())):
        command = f"python {made_by[1]}.py experiment={name}"
        raise ConfigError(f"experiment={name} is {made_by[1]}.py's, not {script()}.py's: {command}")


def _check_local(name: str) -> None:
    """Refuse a file that is not there, which Hydra would pass over, as there need not be one."""
    file = conf() / "local" / f"{name}.yaml"
    if not file.exists():
        raise ConfigError(f"local={name}: there is no file {file}; conf/local/README.md says what belongs there.")
