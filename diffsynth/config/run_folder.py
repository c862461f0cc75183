"""Which folder a run owns, and what it writes down there about itself."""

import hashlib
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

RANK = int(os.environ.get("RANK", 0))
# Keys that change where, how fast or how loudly a run goes, but not what comes out of it.
NOT_SEMANTIC = (
    "hydra",
    "name",
    "output_root",
    "run_dir",
    "data_report",
    "device",
    "logger",
    "export",
    "checkpoint",
    "max_bad_steps",
    "micro_batch_size",
    "teacher_path",
)
# With it a saved configuration runs again: train.py --config-path <run> --config-name config
REPLAY = {"hydra": {"run": {"dir": "${run_dir}"}, "output_subdir": None}}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "hydra-core", "omegaconf")


class RankZeroFilter(logging.Filter):
    """Lets only the first process speak."""

    def filter(self, record: logging.LogRecord) -> bool:
        return RANK == 0


def signature(_root_: DictConfig) -> str:
    """Eight hex digits that change with whatever changes a run's results, and with nothing else."""
    config = OmegaConf.to_container(_root_, resolve=False)
    semantic = {key: value for key, value in config.items() if key not in NOT_SEMANTIC}
    if isinstance(semantic.get("dataset"), dict):
        semantic["dataset"].pop("num_workers", None)
    return hashlib.sha1(json.dumps(semantic, sort_keys=True).encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("signature", signature, replace=True)


def claim(cfg: DictConfig) -> Path | None:
    """Make the run's folder this run's own and write down what runs in it; None if the run is already finished.

    Raises:
        ConfigError: The folder holds another experiment.
    """
    run_dir = Path(cfg.run_dir)
    finished = run_dir / "finished.json"
    if finished.exists():
        artefacts = "\n  ".join(json.loads(finished.read_text())["artefacts"])
        logging.info("%s is finished:\n  %s\nDelete the folder, or change name=…, to run it again.", run_dir, artefacts)
        return None
    if RANK == 0:
        remove_leftovers(run_dir)
        _write_run_files(run_dir, cfg)
    return run_dir


def finish(run_dir: Path, artefacts: Sequence[Path]) -> None:
    """Mark the run as finished, write its report, and name what it left."""
    from ..report import write_report

    if RANK == 0:
        paths = [str(path) for path in [*artefacts, run_dir / "report.html"]]
        write_text(run_dir / "finished.json", json.dumps({"artefacts": paths}, indent=1))
        write_report(run_dir)
        logging.info("Finished. %s holds:\n  %s", run_dir, "\n  ".join(paths))


def _write_run_files(run_dir: Path, cfg: DictConfig) -> None:
    saved = run_dir / "config.yaml"
    if saved.exists() and signature(OmegaConf.load(saved)) != signature(cfg):
        raise ConfigError(f"{run_dir} holds a different experiment; set name=… or delete it.")
    write_text(saved, OmegaConf.to_yaml(cfg) + OmegaConf.to_yaml(OmegaConf.create(REPLAY)))
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
