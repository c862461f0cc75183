"""The script that is running, its folder `conf`, and its configuration."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def script() -> str:
    """Return the running script's name without `.py`, which is also the name of its configuration."""
    return Path(sys.argv[0]).stem


def conf() -> Path:
    """Return the folder `conf` beside the script."""
    return Path(sys.argv[0]).resolve().parent / "conf"


@contextmanager
def acting_as(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Inside, another script counts as the running one, started with these overrides."""
    before, sys.argv = sys.argv, [str(path), *overrides]
    try:
        yield
    finally:
        sys.argv = before


def compose(overrides: Sequence[str], **options: bool) -> DictConfig:
    """Compose the script's configuration with these overrides; `options` are those of `hydra.compose`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf()), version_base="1.3"):
        return hydra.compose(script(), overrides=list(overrides), **options)


def compose_choices(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration, Hydra's own part included, with those overrides that choose options of groups.

    The result is kept and shared: do not change it.
    """
    choices = [word for word in overrides if "=" in word and (conf() / word.split("=")[0]).is_dir()]
    return _compose_choices(conf(), script(), tuple(choices))


@cache  # a third of a second
def _compose_choices(folder: Path, name: str, choices: tuple[str, ...]) -> DictConfig:
    from hydra.errors import HydraException

    try:
        return compose(choices, return_hydra_config=True)
    except HydraException:  # a wrong option, a sweep over options, or an option in --config-dir: take the defaults
        return compose([], return_hydra_config=True)


def is_key(key: str, config: DictConfig) -> bool:
    """Whether a configuration has a dotted key, also if its value is null."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and last in set(node)  # `in node` leaves out one that is ???
