"""Logs the metrics of a run: to `metrics.jsonl`, and to trackers such as TensorBoard."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

from ...core.files import forget_after
from ...core.masking import masked
from .trackers import Tracker


@dataclass
class LocalLogger:
    """Appends metrics to `metrics.jsonl`, and passes metrics and pictures to trackers.

    Args:
        path: The run's folder.
        every: Optimizer steps between two lines of training metrics.
        trackers: The trackers, by any names.
    """

    path: str | Path
    every: int = 10
    trackers: Mapping[str, Tracker] = field(default_factory=dict)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"logger.every is {self.every}; expected at least 1.")

    def due(self, step: int, done: bool) -> bool:
        """Whether training metrics are written after `step` optimizer steps; `done` after the last one."""
        return step > 0 and (done or step % self.every == 0)

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Append one line of metrics after `step` optimizer steps, and pass pictures on to the trackers by name."""
        if values:
            self._append(step, values)
        for name, path in (pictures or {}).items():
            self._send_picture(step, name, path)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers.values():
            tracker.log(step, values)

    def _send_picture(self, step: int, name: str, path: Path) -> None:
        for tracker in self.trackers.values():
            tracker.picture(step, name, Image.open(path).convert("RGB"))

    def start(self, step: int, resumed: bool) -> None:
        """Open the trackers; a resumed run first deletes lines after `step`, because it will take those steps again."""
        forget_after(self.file, step if resumed else -1)
        config = Path(self.path) / "resolved.yaml"
        for tracker in self.trackers.values():
            tracker.start(step, yaml.safe_load(masked(config.read_text(encoding="utf-8"))) if config.exists() else {})

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers.values():
            tracker.finish()

    @property
    def file(self) -> Path:
        """Path of `metrics.jsonl`."""
        return Path(self.path) / "metrics.jsonl"
