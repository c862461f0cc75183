"""Show the progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from .files import going_on_without

LINE_SECONDS = 30  # between two plain lines; a guess


class ProgressBar:
    """Shows the number of steps done, the latest values and the estimated time left.

    Args:
        steps: Number of steps of the run.
        start: Number of steps that an earlier process did, where a run is resumed.
        visible: Whether this process shows anything; only the first of several should.
        unit: The word for a step.
    """

    def __init__(self, steps: int, start: int = 0, visible: bool = True, unit: str = "step"):
        self.terminal = sys.stderr.isatty()
        self.visible, self.unit, self.done = visible, unit, start
        hidden = not (visible and self.terminal)
        self.bar = tqdm(total=steps, initial=start, unit=unit, disable=hidden, dynamic_ncols=True)
        self.steps = steps
        self.start = start + 1  # the estimate leaves out the first step, which is slower
        self.values = ""
        self.began = self.last_line = time.monotonic()

    def show(self, values: Mapping[str, float]) -> None:
        """Show these values from now on."""
        self.values = ", ".join(f"{name}={value:.3g}" for name, value in values.items())
        self.bar.set_postfix_str(self.values, refresh=False)

    def advance(self, step: int) -> None:
        """Count one more step; `step` are done now."""
        self.bar.update()
        self.done = step
        now = time.monotonic()
        if step == self.start:
            self.began = self.last_line = now
        if not self.terminal and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            self._write_line(f"{tqdm.format_interval(left)} left, {self.values}")

    def keep(self) -> None:
        """Print the latest values in a line of their own, which stays on the screen."""
        self._write_line(self.values)

    def _write_line(self, text: str) -> None:
        if self.visible:
            with going_on_without("A line on stderr"):  # it may be a file on a full disk, or a closed pipe
                self.bar.write(f"{self.unit} {self.done}/{self.steps}, {text}".rstrip(", "), file=sys.stderr)
                sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()
