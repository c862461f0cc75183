"""The folder of a sweep: a record of each of its runs, and a page that compares them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ..core.files import going_on_without, write_text
from ..core.json_text import to_json
from ..core.masking import masked_values
from .run_folder import masked_yaml


def sweep_folder(config: DictConfig) -> Path:
    """Return the folder of a sweep; its name hashes the overrides, so that the same command finds it again."""
    overrides = json.dumps(sorted(_overrides(config)))
    return Path(config.hydra.sweep.dir) / f"{config.name}-sweep-{hashlib.sha1(overrides.encode()).hexdigest()[:8]}"


def _overrides(config: DictConfig) -> list[str]:
    """Return a sweep's or a job's overrides as typed, with credentials masked and the environment not read."""
    return masked_values(OmegaConf.to_container(config.hydra.overrides.task, resolve=False))


def record(folder: Path, number: int, run_dir: Path, overrides: Sequence[str]) -> None:
    """Write `<number>.json` for a job of a sweep: its run's folder, relative to `folder`, and its overrides."""
    content = {"run": os.path.relpath(run_dir, folder), "overrides": list(overrides)}
    path = folder / f"{number}.json"
    with going_on_without(path):
        write_text(path, to_json(masked_values(content), indent=1))


def _mask_record_of_hydra(config: DictConfig) -> None:
    """Mask credentials in `multirun.yaml`, which Hydra writes after `on_multirun_start` and before the first job."""
    path = Path(config.hydra.sweep.dir) / "multirun.yaml"
    with going_on_without(path):
        if path.exists():
            write_text(path, masked_yaml(OmegaConf.load(path)))


class SweepRecord(Callback):
    """Hydra callback that records each run of a sweep, and writes the sweep's page after each.

    It sees the jobs that run in this process or its children; `slurm.SlurmLauncher` records its own.
    """

    def __init__(self):
        self.folder: Path | None = None  # None for a single run

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        self.folder = sweep_folder(config)

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        _mask_record_of_hydra(config)

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        if self.folder is not None:
            record(self.folder, config.hydra.job.num, Path(config.run_dir), _overrides(config))
            _mask_record_of_hydra(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: object) -> None:
        from ..report.sweep import write_sweep

        if self.folder is not None:
            with going_on_without(self.folder / "sweep.html"):
                print(write_sweep(self.folder))
