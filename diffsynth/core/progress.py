"""How far a run is: a bar on a terminal, plain lines elsewhere, nothing from any process but the first."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

LINE_SECONDS = 30  # between two plain lines


class ProgressBar:
    """Shows optimizer steps, the latest numbers and the time that is left.

    Args:
        steps: Length of the run.
        start: Steps that lie behind already.
        visible: Whether this process shows anything.
        unit: What is counted.
    """

    def __init__(self, steps: int, start: int = 0, visible: bool = True, unit: str = "step"):
        self.terminal = sys.stderr.isatty()
        self.visible, self.unit, self.done = visible, unit, start
        hidden = not (visible and self.terminal)
        self.bar = tqdm(total=steps, initial=start, unit=unit, disable=hidden, dynamic_ncols=True)
        self.steps, self.start, self.values = steps, start + 1, ""  # the first step also warms everything up
        self.began = self.told = time.monotonic()

    def show(self, values: Mapping[str, float]) -> None:
        """Show these numbers from now on."""
        self.values = ", ".join(f"{name}={value:.3g}" for name, value in values.items())
        self.bar.set_postfix_str(self.values, refresh=False)

    def advance(self, step: int) -> None:
        """Say that one more, `step` optimizer steps lie behind."""
        self.bar.update()
        self.done = step
        now = time.monotonic()
        if step == self.start:
            self.began = self.told = now
        if self.visible and not self.terminal and now - self.told >= LINE_SECONDS:
            self.told = now
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            line = f"{self.unit} {step}/{self.steps}, {tqdm.format_interval(left)} left, {self.values}"
            print(line.rstrip(", "), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
