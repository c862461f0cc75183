"""Trackers send metrics and pictures of a run to a service; each class wraps accelerate's tracker of that service.

A tracker is opened at the step from which a run resumes, so that no step appears twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from PIL import Image

from ...core.json_text import to_json


class Tracker:
    """The base class of trackers; subclasses override `open`."""

    package: ClassVar[str]

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        """Return accelerate's tracker of the run, which starts or resumes at `step`.

        Args:
            config: The run's resolved configuration.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Check that the service's package is installed.

        Raises:
            ValueError: It is not.
        """
        if find_spec(self.package) is None:
            raise self._lacks_package("it is not installed")

    def _lacks_package(self, reason: object) -> ValueError:
        name = type(self).__name__
        return ValueError(f'{name} needs {self.package}: pip install "diffsynth-hydra[loggers]" ({reason})')

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Open the run at the service, from `step` on.

        Raises:
            ValueError: The service's package is not installed, or lacks a package itself.
        """
        try:
            self.tracker = self.open(step, config)
            self.tracker.start()
        except ImportError as error:
            raise self._lacks_package(error) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics by name."""
        self.tracker.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Send one picture."""
        self.tracker.log_images({name: [picture]}, step=step)

    def finish(self) -> None:
        """Close the run at the service."""
        self.tracker.finish()


@dataclass
class TensorBoard(Tracker):
    """Writes TensorBoard event files.

    Args:
        path: Folder of the event files.
    """

    path: str
    package = "tensorboard"

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        folder = Path(self.path)
        return tracking.TensorBoardTracker(folder.name, folder.parent, purge_step=step + 1)

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        super().start(step, config)
        if step == 0:
            self.tracker.tracker.add_text("config", f"```\n{to_json(config, indent=1)}\n```", 0)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")


@dataclass
class WandB(Tracker):
    """Sends to Weights & Biases.

    Args:
        project: Name of the project there.
        name: Name of the run there.
        id: Identifies the run, so that resuming continues it.
        path: Folder of wandb's own files.
        mode: `offline` writes to `path` only, for a later `wandb sync`.
    """

    project: str
    name: str
    id: str
    path: str
    mode: Literal["online", "offline", "disabled"] = "online"
    package = "wandb"

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        run = {"name": self.name, "id": self.id, "dir": self.path, "mode": self.mode, "config": config}
        return tracking.WandBTracker(self.project, resume="allow", **run)


@dataclass
class SwanLab(Tracker):
    """Sends to SwanLab.

    Args:
        project: Name of the project there.
        name: Name of the run there.
        id: Identifies the run, so that resuming continues it.
        path: Folder of swanlab's own files.
        mode: `local` and `offline` write to `path` only.
    """

    project: str
    name: str
    id: str
    path: str
    mode: Literal["online", "local", "offline", "disabled"] = "online"
    package = "swanlab"

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        run = {"name": self.name, "id": self.id, "log_dir": self.path, "mode": self.mode, "config": config}
        return tracking.SwanLabTracker(self.project, resume="allow", **run)


@dataclass
class Trackio(Tracker):
    """Sends to Trackio, which stores runs on this machine; `trackio show` opens them.

    Args:
        project: Name of the project there.
        name: Name of the run there.
    """

    project: str
    name: str
    package = "trackio"

    def open(self, step: int, config: Mapping[str, Any]) -> GeneralTracker:
        return tracking.TrackioTracker(self.project, name=self.name, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.tracker.tracker.log(dict(values), step=step)  # accelerate's own `log` drops the step before 1.14

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        import trackio

        self.log(step, {name: trackio.Image(picture)})
