"""Numbers of a run: lines in a file, and whatever trackers make of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

from ...core.files import forget_after
from .trackers import Tracker


@dataclass
class LocalLogger:
    """Appends numbers to `metrics.jsonl`, and hands numbers and pictures on to trackers.

    Args:
        path: The run's folder.
        every: Optimizer steps between two lines.
        trackers: By any name.
    """

    path: str | Path
    every: int = 10
    trackers: Mapping[str, Tracker] = field(default_factory=dict)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"logger.every is {self.every}; expected at least 1.")

    def due(self, step: int, done: bool) -> bool:
        """Whether the training's own numbers are written after `step` optimizer steps."""
        return step > 0 and (done or step % self.every == 0)

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Append one line of numbers as they are after `step` optimizer steps, and hand on pictures by name."""
        if values:
            self._append(step, values)
        for name, path in (pictures or {}).items():
            self._hand_on(step, name, path)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers.values():
            tracker.log(step, values)

    def _hand_on(self, step: int, name: str, path: Path) -> None:
        for tracker in self.trackers.values():
            tracker.picture(step, name, Image.open(path).convert("RGB"))

    def start(self, step: int, resumed: bool) -> None:
        """Begin, or go on from `step`: what came after it is forgotten, as it will come again."""
        forget_after(self.file, step if resumed else -1)
        config = Path(self.path) / "resolved.yaml"
        for tracker in self.trackers.values():
            tracker.start(step, yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {})

    def finish(self) -> None:
        """Nothing more comes."""
        for tracker in self.trackers.values():
            tracker.finish()

    @property
    def file(self) -> Path:
        return Path(self.path) / "metrics.jsonl"
