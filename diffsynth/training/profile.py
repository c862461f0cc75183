"""A trace of a few optimizer steps: what the processor and the GPU did when."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

logger = logging.getLogger(__name__)


@dataclass
class Profile(AbstractContextManager):
    """Writes a Chrome trace of each process; `step` is to be called after every optimizer step.

    Args:
        path: Folder of the traces, `rank-0.json.gz` and so on.
        after: Optimizer steps before the trace begins; the last of them warms the profiler up.
        steps: Optimizer steps in it.
    """

    path: str | Path
    after: int = 3
    steps: int = 3

    def __post_init__(self):
        if self.after < 1 or self.steps < 1:
            raise ValueError(f"profile.after is {self.after}, profile.steps {self.steps}; expected at least 1 of each.")

    def __enter__(self) -> "Profile":
        plan = torch.profiler.schedule(wait=self.after - 1, warmup=1, active=self.steps, repeat=1)
        self.profiler = torch.profiler.profile(schedule=plan, on_trace_ready=self._write)
        self.profiler.start()
        return self

    def __exit__(self, *_) -> None:
        self.profiler.stop()

    def step(self) -> None:
        self.profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        file = Path(self.path) / f"rank-{PartialState().process_index}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        logger.info("A trace of %d steps is in %s; open it at https://ui.perfetto.dev.", self.steps, file)
