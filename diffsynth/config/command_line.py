"""From words on the command line to a run, and mistakes in them to one clear line."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from . import slurm
from .choices import START
from .nodes import ConfigError

HELP = ({"-h"}, {"--help"})
RUNS_OF = {"plan": "train"}  # scripts that plan runs of another, and so take its experiments
PART = "_"  # what a file is named by that other options are made of


def run_main(main: Callable[[], None]) -> None:
    """Call a Hydra main; a configuration that cannot be composed ends in one clear line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what it would otherwise print and swallow
    try:
        if {word for word in sys.argv[1:] if word.startswith("-")} in HELP:  # with other flags: Hydra's own help
            return print(help_text([word for word in sys.argv[1:] if not word.startswith("-")]))
        for group, check in {"experiment": _check_experiment, "local": _check_local}.items():
            for name in _named(group):
                check(name)
        slurm.register()
        main()
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(f"error: {_explain(error)}")
    except (JobFailed, ConfigError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # Hydra makes the run's folder before anything of ours runs
        sys.exit(f"error: {error}; set output_root=… to a folder that can be written.")


def _named(group: str) -> list[str]:
    """The options of a group that the command line names; a sweep names several."""
    words = [word.removeprefix(f"{group}=") for word in sys.argv[1:] if word.startswith(f"{group}=")]
    return [name for word in words for name in word.split(",")]


def _check_experiment(name: str) -> None:
    """Refuse an experiment of another script, which a comment at its top names by its command."""
    file = _conf() / "experiment" / f"{name}.yaml"
    head = "".join(takewhile(lambda line: line.startswith("#"), file.open(encoding="utf-8"))) if file.exists() else ""
    made_by = re.search(r"(\w+)\.py experiment=", head)
    script = Path(sys.argv[0]).stem
    if made_by and made_by[1] not in (script, RUNS_OF.get(script)):
        command = f"python {made_by[1]}.py experiment={name}"
        raise ConfigError(f"experiment={name} is {made_by[1]}.py's, not {script}.py's: {command}")


def _check_local(name: str) -> None:
    """Refuse a file that is not there, which Hydra would pass over, as there need not be one."""
    file = _conf() / "local" / f"{name}.yaml"
    if not file.exists():
        raise ConfigError(f"local={name}: there is no file {file}; conf/local/README.md says what belongs there.")


class JobFailed(Exception):
    """A job of a sweep ended with an error, which its log has; the others go on."""


@contextmanager
def explained() -> Iterator[None]:
    """Mistakes in a run's configuration or input end it in one clear line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DIFFSYNTH_TRACEBACK"):
            raise
        if _is_in_sweep():
            logging.error(error)
            raise JobFailed(error) from None
        sys.exit(f"error: {error}\n(DIFFSYNTH_TRACEBACK=1 shows where this was raised)")


def _is_in_sweep() -> bool:
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def _explain(error: ConfigCompositionException | OverrideParseException) -> str:
    """Hydra's message, and for an unknown key the nearest valid one."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {message}"
    if not message.startswith("Could not override '"):
        return f"{message}\n{error.__cause__ or ''}".strip()
    path = message.split("'")[1]
    config = _chosen_groups(other_than=path)
    if (_conf() / path).is_dir():
        return _explain_group(path, config.hydra.runtime.choices)
    parent, _, key = path.rpartition(".")
    while parent and OmegaConf.select(config, parent) is None:  # the first part of the path that is not there
        path, (parent, _, key) = parent, parent.rpartition(".")
    siblings = (OmegaConf.select(config, parent) if parent else config) or ()
    nearest = difflib.get_close_matches(key, siblings, 1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {sorted(siblings)}."
    return f"{path}: no such key {key!r}; {hint}"


def _explain_group(group: str, choices: Mapping[str, str]) -> str:
    """Why nothing can be chosen of a group that there is: another task has it, or another script."""
    tasks = _conf() / "task"
    having = [file for file in sorted(tasks.rglob("*.yaml")) if f"- /{group}: " in file.read_text(encoding="utf-8")]
    if not having or "task" not in choices:
        own = sorted(name for name in choices if "hydra/" not in name)
        return f"{group}: {Path(sys.argv[0]).name} has no such group; it has {', '.join(own)}."
    names = ", ".join(file.relative_to(tasks).with_suffix("").as_posix() for file in having)
    return f"{group}: task={choices['task']} has no {group} to choose; these tasks have: {names}."


def _chosen_groups(other_than: str) -> DictConfig:
    """The configuration with only the groups that the command line chooses, else the script's own."""
    words = [word for word in sys.argv[1:] if "=" in word and word.split("=")[0] != other_than]
    chosen = [word for word in words if (_conf() / word.split("=")[0]).is_dir()]
    try:
        return _compose(chosen, return_hydra_config=True)
    except ConfigCompositionException:  # a sweep over groups, or one found through --config-dir
        return _compose([], return_hydra_config=True)


def help_text(overrides: Sequence[str] = ()) -> str:
    """Every option of every group with the phrase its file starts with, and the configuration as it is composed.

    Hydra's own help reads the search path anew for every group it lists, which takes longer than everything else.
    """
    config = _compose(overrides, return_hydra_config=True)
    groups = "\n".join(_describe_group(group, chosen) for group, chosen in sorted(_choices(config, overrides).items()))
    yaml = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    script = Path(sys.argv[0]).name
    return f"python {script} group=option … key=value …\n\nGroups (* is chosen)\n\n{groups}\nConfiguration\n\n{yaml}"


def _choices(config: DictConfig, overrides: Sequence[str]) -> dict[str, list[str]]:
    """The options that are chosen, by group; Hydra does not count groups whose options add up."""
    lists = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    adding_up = [path.parent.name for path in _conf().glob(f"*/{START}.yaml") if path.parent.name in config]
    chosen = {group: [START, *_as_list(lists.get(group))] for group in adding_up}
    for group, choice in config.hydra.runtime.choices.items():
        if "hydra/" not in group:
            chosen[group] = [*chosen.get(group, ()), choice]
    return chosen


def _as_list(value) -> list:
    return value if isinstance(value, list) else []


def _describe_group(group: str, chosen: Sequence[str]) -> str:
    folder = _conf() / group
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith(PART)]
    options = {path.relative_to(folder).with_suffix("").as_posix(): _phrase(path) for path in files}
    width = max(map(len, options), default=0)
    lines = [f"  {'*' if name in chosen else ' '} {name:{width}}  {options[name]}".rstrip() for name in sorted(options)]
    return "\n".join([group, *lines, ""])


def _phrase(path: Path) -> str:
    """The comment a YAML file starts with, Hydra's package header aside."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""


def _compose(overrides: Sequence[str], **options) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(_conf()), version_base="1.3"):
        return compose(Path(sys.argv[0]).stem, overrides=list(overrides), **options)


def _conf() -> Path:
    return Path(sys.argv[0]).resolve().parent / "conf"
