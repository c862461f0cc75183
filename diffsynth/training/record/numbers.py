"""Logs the metrics of a run: to `metrics.jsonl`, and to trackers such as TensorBoard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ...core.data.operators.picture_files import read_image
from ...core.files import forget_after, forget_at, going_on_without
from ...core.json_lines import JsonLines
from ...core.masking import masked_values
from ...core.ranges import PositiveInt, check_fields
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
    every: PositiveInt = 10
    trackers: Mapping[str, Tracker] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "logger.")
        self.lines = JsonLines(self.file)
        self.closed: set[str] = set()  # names of trackers whose files could not be written

    def check(self) -> None:
        """Check that every tracker has its package.

        Raises:
            ValueError: One has not.
        """
        for tracker in self.trackers.values():
            tracker.check()

    def due(self, step: int, done: bool) -> bool:
        """Whether training metrics are written after `step` optimizer steps; `done` after the last one."""
        return step > 0 and (done or step % self.every == 0)

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Append one line of metrics after `step` optimizer steps, and pass pictures on to the trackers by name."""
        if values:
            self.lines.append(step, values)
            self._send(step, lambda tracker: tracker.log(step, values))
        for name, path in (pictures or {}).items():
            self._send(step, lambda tracker, name=name, path=path: tracker.picture(step, name, read_image(str(path))))

    def _send(self, step: int, send: Callable[[Tracker], None]) -> None:
        """Call `send` with each tracker; one whose files cannot be written is opened anew the next time."""
        for name, tracker in self.trackers.items():
            with going_on_without(f"Step {step} of logger.trackers.{name}"):
                if name in self.closed:
                    tracker.start(step - 1, self._config())
                self.closed.add(name)
                send(tracker)
                self.closed.remove(name)

    def start(self, step: int, resumed: bool) -> None:
        """Open the trackers; a resumed run first deletes lines after `step`, because it will take those steps again."""
        forget_after(self.file, step if resumed else -1)
        for tracker in self.trackers.values():
            tracker.start(step, self._config())

    def forget(self, step: int, name: str) -> None:
        """Delete lines of a step that have the metric `name`, because a resumed run writes them again."""
        forget_at(self.file, step, name)

    def _config(self) -> dict:
        config = Path(self.path) / "resolved.yaml"
        return masked_values(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.exists() else {}

    def finish(self) -> None:
        """Write the lines that waited for room on the disk, and close the trackers."""
        self.lines.flush()
        for name, tracker in self.trackers.items():
            with going_on_without(f"The end of logger.trackers.{name}"):
                tracker.finish()

    @property
    def file(self) -> Path:
        """Path of `metrics.jsonl`."""
        return Path(self.path) / "metrics.jsonl"
