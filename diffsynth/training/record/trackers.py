"""Where else numbers and pictures of a run go: one class a service, each over accelerate's tracker of it.

A tracker is opened at the step a run goes on from, so that nothing appears twice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from PIL import Image


class Tracker:
    """A service; subclasses say how a run is opened there."""

    package: ClassVar[str]

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        raise NotImplementedError

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Open the run, which goes on from `step`.

        Raises:
            ValueError: The service's package is not installed.
        """
        try:
            self.tracker = self.open(step, config)
            self.tracker.start()
        except ImportError as error:
            raise ValueError(
                f'{type(self).__name__} needs {self.package}: pip install "diffsynth-hydra[loggers]" ({error})'
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.tracker.log_images({name: [picture]}, step=step)

    def finish(self) -> None:
        self.tracker.finish()


@dataclass
class TensorBoard(Tracker):
    """Event files.

    Args:
        path: Their folder.
    """

    path: str
    package = "tensorboard"

    def open(self, step, config):
        folder = Path(self.path)
        return tracking.TensorBoardTracker(folder.name, folder.parent, purge_step=step + 1)

    def start(self, step, config):
        super().start(step, config)
        if step == 0:
            self.tracker.tracker.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", 0)

    def picture(self, step, name, picture):
        self.tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")


@dataclass
class WandB(Tracker):
    """Weights & Biases.

    Args:
        mode: `offline` keeps everything in `path`, for `wandb sync` later.
    """

    project: str
    name: str
    id: str
    path: str
    mode: Literal["online", "offline", "disabled"] = "online"
    package = "wandb"

    def open(self, step, config):
        run = {"name": self.name, "id": self.id, "dir": self.path, "mode": self.mode, "config": config}
        return tracking.WandBTracker(self.project, resume="allow", **run)


@dataclass
class SwanLab(Tracker):
    """SwanLab.

    Args:
        mode: `local` and `offline` keep everything in `path`.
    """

    project: str
    name: str
    id: str
    path: str
    mode: Literal["online", "local", "offline", "disabled"] = "online"
    package = "swanlab"

    def open(self, step, config):
        run = {"name": self.name, "id": self.id, "log_dir": self.path, "mode": self.mode, "config": config}
        return tracking.SwanLabTracker(self.project, resume="allow", **run)


@dataclass
class Trackio(Tracker):
    """Trackio, which keeps runs on this machine (`trackio show`)."""

    project: str
    name: str
    package = "trackio"

    def open(self, step, config):
        return tracking.TrackioTracker(self.project, name=self.name, config=dict(config), resume="allow")

    def log(self, step, values):
        self.tracker.tracker.log(dict(values), step=step)  # accelerate's own `log` drops the step before 1.14

    def picture(self, step, name, picture):
        import trackio

        self.log(step, {name: trackio.Image(picture)})
