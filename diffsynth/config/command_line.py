"""Runs a script's main function, and turns mistakes on its command line into errors of one line."""

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
from .choices import check_arguments
from .help import help_text
from .nodes import ConfigError
from .script import compose, conf, script

HELP = ({"-h"}, {"--help"})


def run_main(main: Callable[[], None]) -> None:
    """Call a function that `hydra.main` decorates; a mistake in the configuration exits with an error of one line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its errors and exits
    try:
        flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
        if flags in HELP:  # with other flags, Hydra shows its own help
            return print(help_text([argument for argument in sys.argv[1:] if argument not in flags]))
        check_arguments(sys.argv[1:])
        slurm.register()
        main()
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(f"error: {_explain(error)}")
    except (JobFailed, ConfigError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # Hydra makes the run's folder before it calls `main`
        sys.exit(f"error: {error}; set {_folder_key()}=… to a folder that can be written to.")


def _folder_key() -> str:
    """Return the key of the folder that the running script writes to; plan.py also has that of the runs it plans."""
    return next(key for key in ("path", "output", "output_root") if key in compose([]))


class JobFailed(Exception):
    """A job of a sweep ended with an error, which is in its log; the other jobs go on."""


@contextmanager
def explained() -> Iterator[None]:
    """Inside, errors of a run's configuration and input exit with their message instead of a traceback."""
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
    """Return Hydra's message; for an unknown key, return the nearest valid one."""
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
    while parent and OmegaConf.select(config, parent) is None:  # go up to the first part that does not exist
        path, (parent, _, key) = parent, parent.rpartition(".")
    siblings = (OmegaConf.select(config, parent) if parent else config) or ()
    nearest = difflib.get_close_matches(key, siblings, 1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {sorted(siblings)}."
    return f"{path}: no such key {key!r}; {hint}"


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
