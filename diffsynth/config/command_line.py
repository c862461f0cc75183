"""From words on the command line to a run, and mistakes in them to one clear line."""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from . import slurm
from .nodes import ConfigError

HELP = ({"-h"}, {"--help"})


def run_main(main: Callable[[], None]) -> None:
    """Call a Hydra main; a configuration that cannot be composed ends in one clear line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what it would otherwise print and swallow
    try:
        if {word for word in sys.argv[1:] if word.startswith("-")} in HELP:  # with other flags: Hydra's own help
            return print(help_text([word for word in sys.argv[1:] if not word.startswith("-")]))
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
    parent, _, key = path.rpartition(".")
    config = _chosen_groups()
    while parent and OmegaConf.select(config, parent) is None:  # the first part of the path that is not there
        path, (parent, _, key) = parent, parent.rpartition(".")
    siblings = (OmegaConf.select(config, parent) if parent else config) or ()
    nearest = difflib.get_close_matches(key, siblings, 1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {sorted(siblings)}."
    return f"{path}: no such key {key!r}; {hint}"


def _chosen_groups() -> DictConfig:
    """The configuration with only the groups that the command line chooses, else the script's own."""
    chosen = [word for word in sys.argv[1:] if "=" in word and (_conf() / word.split("=")[0]).is_dir()]
    try:
        return _compose(chosen, return_hydra_config=True)
    except ConfigCompositionException:  # a sweep over groups, or one found through --config-dir
        return _compose([], return_hydra_config=True)


def help_text(overrides: Sequence[str] = ()) -> str:
    """Every option of every group with the phrase its file starts with, and the configuration as it is composed.

    Hydra's own help reads the search path anew for every group it lists, which takes longer than everything else.
    """
    config = _compose(overrides, return_hydra_config=True)
    choices = {group: choice for group, choice in config.hydra.runtime.choices.items() if "hydra/" not in group}
    groups = "\n".join(_describe_group(group, choice) for group, choice in sorted(choices.items()))
    yaml = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    script = Path(sys.argv[0]).name
    return f"python {script} group=option … key=value …\n\nGroups (* is chosen)\n\n{groups}\nConfiguration\n\n{yaml}"


def _describe_group(group: str, choice: str | None) -> str:
    folder = _conf() / group
    options = {path.relative_to(folder).with_suffix("").as_posix(): _phrase(path) for path in folder.rglob("*.yaml")}
    width = max(map(len, options))
    lines = [f"  {'*' if name == choice else ' '} {name:{width}}  {options[name]}".rstrip() for name in sorted(options)]
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
