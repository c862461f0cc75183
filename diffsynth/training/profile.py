"""`Profile`: a trace of a few optimizer steps by torch's profiler, to see where the time goes on CPU and GPU."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from ..core.files import going_on_without, replacing
from ..core.ranges import PositiveInt, check_fields

logger = logging.getLogger(__name__)


@dataclass
class Profile(AbstractContextManager):
    """Writes a Chrome trace of each process; call `step` after every optimizer step.

    Args:
        path: Folder of the traces `rank-N.json.gz`.
        after: Number of optimizer steps before the trace begins; the last of them warms up the profiler.
        steps: Number of optimizer steps in the trace.

    Raises:
        ValueError: One of the numbers is below 1.
    """

    path: str | Path
    after: PositiveInt = 3
    steps: PositiveInt = 3

    def __post_init__(self):
        check_fields(self, "profile.")

    def __enter__(self) -> "Profile":
        phases = torch.profiler.schedule(wait=self.after - 1, warmup=1, active=self.steps, repeat=1)
        self.profiler = torch.profiler.profile(schedule=phases, on_trace_ready=self._write)
        self.is_traced = False
        self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()
        if not self.is_traced:
            logger.warning("No trace is written: the run ended before step %d.", self.after + self.steps)

    def step(self) -> None:
        """Count one optimizer step; the last traced one writes the trace."""
        self.profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        file = Path(self.path) / f"rank-{PartialState().process_index}.json.gz"
        self.is_traced = True
        with going_on_without(file):  # there is no second try: torch writes a trace only once
            with replacing(file) as partial:
                profiler.export_chrome_trace(str(partial))
            logger.info("A trace of %d steps is in %s; open it at https://ui.perfetto.dev.", self.steps, file)
