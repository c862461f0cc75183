"""Which folder a run owns, and what it writes down there about itself."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..core.files import remove_leftovers, write_text
from .nodes import ConfigError
from .signature import bound_to_length, but_for_length, signature

RANK = int(os.environ.get("RANK", 0))
# With it a saved configuration runs again: train.py --config-path <run> --config-name config
REPLAY = {"hydra": {"run": {"dir": "${run_dir}"}, "output_subdir": None}}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "hydra-core", "omegaconf")


class RankZeroFilter(logging.Filter):
    """Lets only the first process speak."""

    def filter(self, record: logging.LogRecord) -> bool:
        return RANK == 0


def claim(cfg: DictConfig) -> Path | None:
    """Make the run's folder this run's own and write down what runs in it; None if the run is already finished.

    Raises:
        ConfigError: The folder holds another experiment, or this one at another length that it can't have.
    """
    run_dir = Path(cfg.run_dir)
    if is_finished(cfg):
        artefacts = "\n  ".join(_finished(run_dir)["artefacts"])
        logging.info("%s is finished:\n  %s\nDelete the folder, or change name=…, to run it again.", run_dir, artefacts)
        return None
    if RANK == 0:
        _check_folder(run_dir, cfg)
        remove_leftovers(run_dir)
        _write_run_files(run_dir, cfg)
    return run_dir


def is_finished(cfg: DictConfig) -> bool:
    """Whether a run has finished, at the length that it is to have now."""
    finished = _finished(Path(cfg.run_dir))
    return finished is not None and finished["length"] == _length(cfg)


def finish(run_dir: Path, artefacts: Sequence[Path]) -> None:
    """Mark the run as finished, write its report, and name what it left."""
    from ..report import write_report

    if RANK == 0:
        cfg = OmegaConf.load(run_dir / "config.yaml")
        paths = [str(path) for path in [*artefacts, run_dir / "report.html"]]
        record = {"artefacts": paths, "length": _length(cfg), "but_for_length": but_for_length(cfg)}
        write_text(run_dir / "finished.json", json.dumps(record, indent=1))
        write_report(run_dir)
        logging.info("Finished. %s holds:\n  %s", run_dir, "\n  ".join(paths))


def _finished(run_dir: Path) -> dict | None:
    path = run_dir / "finished.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _length(cfg: DictConfig) -> dict[str, float]:
    """A run's length as it was asked for: optimizer steps, else passes over the data."""
    return {"num_epochs": cfg.num_epochs} if cfg.max_steps is None else {"max_steps": cfg.max_steps}


def _check_folder(run_dir: Path, cfg: DictConfig) -> None:
    """Refuse the folder of another experiment; say why a run that differs in its length only starts anew."""
    finished = _finished(run_dir)
    if finished and cfg.max_steps is not None and cfg.max_steps < finished["length"].get("max_steps", 0):
        past = finished["length"]["max_steps"]
        raise ConfigError(f"{run_dir} is finished at step {past}; set name=… for a run of max_steps={cfg.max_steps}.")
    if (run_dir / "config.yaml").exists():
        saved = OmegaConf.load(run_dir / "config.yaml")
        if signature(saved) != signature(cfg):
            same = but_for_length(saved) == but_for_length(cfg)
            another = f"{run_dir} holds a different experiment; set name=… or delete it."
            raise ConfigError(_not_extended(run_dir, cfg) if same else another)
        return
    for path in sorted(run_dir.parent.glob(f"{cfg.name}-*/finished.json")):
        if _finished(path.parent)["but_for_length"] == but_for_length(cfg):
            logging.info("This run starts anew: %s", _not_extended(path.parent, cfg))


def _not_extended(run_dir: Path, cfg: DictConfig) -> str:
    return (
        f"{run_dir} is the same but for its length, and can't be extended, as {bound_to_length(cfg)} sets every step "
        f"by that length; lora.checkpoint=… starts from what is in {run_dir}/weights, name=… in a folder of its own."
    )


def _write_run_files(run_dir: Path, cfg: DictConfig) -> None:
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg) + OmegaConf.to_yaml(OmegaConf.create(REPLAY)))
    write_text(run_dir / "resolved.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_text(run_dir / "command.json", json.dumps(sys.argv))
    write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))


def environment() -> dict[str, Any]:
    """The commit, uncommitted changes and package versions that a run was made with."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD"), "python": sys.version, **versions}


def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or installed from a package
        return None
