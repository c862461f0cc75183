"""From words on the command line to a run, and mistakes in them to one clear line."""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from . import slurm
from .choices import check_words
from .help import help_text
from .nodes import ConfigError
from .script import compose, conf, script

HELP = ({"-h"}, {"--help"})


def run_main(main: Callable[[], None]) -> None:
    """Call a Hydra main; a configuration that cannot be composed ends in one clear line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what it would otherwise print and swallow
    try:
        if {word for word in sys.argv[1:] if word.startswith("-")} in HELP:  # with other flags: Hydra's own help
            return print(help_text([word for word in sys.argv[1:] if not word.startswith("-")]))
        check_words(sys.argv[1:])
        slurm.register()
        main()
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(f"error: {_explain(error)}")
    except (JobFailed, ConfigError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # Hydra makes the run's folder before anything of ours runs
        sys.exit(f"error: {error}; set output_root=… to a folder that can be written.")


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
    if (conf() / path).is_dir():
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
    tasks = conf() / "task"
    having = [file for file in sorted(tasks.rglob("*.yaml")) if f"- /{group}: " in file.read_text(encoding="utf-8")]
    if not having or "task" not in choices:
        own = sorted(name for name in choices if "hydra/" not in name)
        return f"{group}: {script()}.py has no such group; it has {', '.join(own)}."
    names = ", ".join(file.relative_to(tasks).with_suffix("").as_posix() for file in having)
    return f"{group}: task={choices['task']} has no {group} to choose; these tasks have: {names}."


def _chosen_groups(other_than: str) -> DictConfig:
    """The configuration with only the groups that the command line chooses, else the script's own."""
    words = [word for word in sys.argv[1:] if "=" in word and word.split("=")[0] != other_than]
    chosen = [word for word in words if (conf() / word.split("=")[0]).is_dir()]
    try:
        return compose(chosen, return_hydra_config=True)
    except ConfigCompositionException:  # a sweep over groups, or one found through --config-dir
        return compose([], return_hydra_config=True)
