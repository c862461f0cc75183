"""`Clock`: times the steps of a training loop, and traces a few of them."""

import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import traces

TRACED = 2  # steps; a guess: two tell what is between them


@dataclass(frozen=True)
class Setting:
    """How rows are measured.

    Args:
        device: `cuda`, `cpu` or `mps`.
        folder: Folder for images, checkpoints and pictures.
        profile: Folder of a trace of what GPU and CPU do; None traces the GPU alone, into `folder`, for its figures.
        tiny: Measure embedded models of 64 × 64 pixels instead of the released ones.
        warm_up, steps: Steps before the clock starts, and steps that are timed.
    """

    device: str
    folder: Path
    profile: Path | None = None
    tiny: bool = False
    warm_up: int = 3
    steps: int = 20


class Clock(AbstractContextManager):
    """Times the steps of a loop, and traces the steps after them; takes the place of `training.profile.Profile`."""

    def __init__(self, setting: Setting, name: str):
        self.setting, self.trace = setting, (setting.profile or setting.folder) / f"{name}.json"
        self.times: list[float] = []

    def __enter__(self) -> "Clock":
        on_cpu, on_gpu = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
        is_gpu = self.setting.device == "cuda"
        self.profiler = torch.profiler.profile(
            activities=[*[on_gpu] * is_gpu, *[on_cpu] * (self.setting.profile is not None or not is_gpu)]
        )
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def first_traced(self) -> int:
        """Number of steps before the first that is traced."""
        return self.setting.warm_up + self.setting.steps

    @property
    def total(self) -> int:
        """Number of steps until everything is measured."""
        return self.first_traced + self.traced

    @property
    def traced(self) -> int:
        """Number of steps that are traced."""
        return min(TRACED, self.setting.steps)

    def step(self) -> None:
        """Count one step: wait until the device is done with it."""
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.began)
        if len(self.times) == self.first_traced:
            self.profiler.start()
        if len(self.times) == self.total:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.trace))
        self.began = time.perf_counter()

    @property
    def timed(self) -> list[float]:
        """Seconds of each step between warm-up and trace."""
        return self.times[self.setting.warm_up : self.first_traced]

    def figures(self) -> dict[str, float | None]:
        """Seconds of a step, of the slowest and of the very first one, and what the trace says."""
        seconds = {"seconds": statistics.median(self.timed), "slowest": max(self.timed), "first": self.times[0]}
        return {**seconds, **traces.figures(traces.read(self.trace), self.traced)}
