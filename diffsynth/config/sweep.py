"""What a sweep leaves beside its runs: which they are, and a page that compares them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ..core.files import write_text


def sweep_folder(config: DictConfig) -> Path:
    """Of the sweep that a command line asks for; the same command finds it again."""
    asked = json.dumps(sorted(config.hydra.overrides.task))
    return Path(config.hydra.sweep.dir) / f"{config.name}-sweep-{hashlib.sha1(asked.encode()).hexdigest()[:8]}"


def record(folder: Path, number: int, run_dir: Path, overrides: Sequence[str]) -> None:
    """Note where job `number` of a sweep runs, as seen from `folder`, and with what."""
    about = {"run": os.path.relpath(run_dir, folder), "overrides": list(overrides)}
    write_text(folder / f"{number}.json", json.dumps(about, indent=1))


class SweepRecord(Callback):
    """Notes each run of a sweep in this process or its children, and keeps the page about them up to date."""

    def __init__(self):
        self.folder: Path | None = None  # None: a single run

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        self.folder = sweep_folder(config)

    def on_job_start(self, config: DictConfig, **_) -> None:
        if self.folder is not None:
            record(self.folder, config.hydra.job.num, Path(config.run_dir), config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        from ..report.sweep import write_sweep

        if self.folder is not None:
            print(write_sweep(self.folder))
