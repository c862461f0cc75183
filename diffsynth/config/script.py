"""The script that runs, and the folder of configurations beside it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig


def script() -> str:
    """Its name without `.py`, which its configuration has too."""
    return Path(sys.argv[0]).stem


def conf() -> Path:
    """The folder `conf`."""
    return Path(sys.argv[0]).resolve().parent / "conf"


def compose(overrides: Sequence[str], **options) -> DictConfig:
    """The script's configuration with these overrides."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf()), version_base="1.3"):
        return hydra.compose(script(), overrides=list(overrides), **options)
