"""The training metrics between two lines of the log: mean loss, gradient norm and samples per second."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.trained import MODEL

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Count:
    """Sums over the steps that trained one part: `loss` () over their samples, `grad_norm` over the steps.

    A number that an objective notes (`diffusion.noted`) is counted alike, without `grad_norm` and `steps`.
    """

    loss: Tensor
    samples: int = 0
    grad_norm: float = 0.0
    steps: int = 0


class Meter:
    """Averages metrics over steps, micro-batches and processes, from one `read` to the next.

    A step that trains a part other than the model has metrics of its own, such as `fake_score_loss`.

    Args:
        cp_size: Context-parallel size: this many processes count the same samples.
    """

    def __init__(self, accelerator: "Accelerator", cp_size: int = 1):
        self.accelerator, self.device, self.cp_size = accelerator, accelerator.device, cp_size
        self.losses: list[Tensor] = []  # of the current step, one tensor (b,) per micro-batch
        self.notes: list[tuple[str, Tensor]] = []  # names and values (b,) of the current step
        self._clear()

    def _clear(self) -> None:
        self.counts: dict[str, Count] = {}  # by the name of the trained part
        self.started, self.timed_samples = time.perf_counter(), 0

    def _count(self, part: str) -> Count:
        return self.counts.setdefault(part, Count(torch.zeros((), device=self.device)))

    def add_losses(self, losses: Tensor) -> None:
        """Add the losses (b,) of one micro-batch; they stay on the device, so that nothing waits for it."""
        self.losses.append(losses.detach().float().reshape(-1).to(self.device))

    def add_notes(self, notes: Iterable[tuple[str, Tensor]]) -> None:
        """Add what an objective has noted of one micro-batch: names, and values (b,)."""
        self.notes += [(name, values.float().reshape(-1).to(self.device)) for name, values in notes]

    def end_step(self, grad_norm: float | None, part: str = MODEL) -> None:
        """Count one optimizer step of `part`; a skipped one (`grad_norm` is None) only takes time."""
        if grad_norm is not None:
            count = self._count(part)
            count.steps += 1
            count.grad_norm += grad_norm
            for losses in self.losses:
                count.loss += losses.sum()
                count.samples += losses.numel()
                self.timed_samples += losses.numel()
            for name, values in self.notes:
                noted = self._count(name)
                noted.loss += values.sum()
                noted.samples += values.numel()
        self.losses, self.notes = [], []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent in the block, such as validation and saving, as training time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """Return the means since the last call, equal on every process, and start again from zero."""
        counts = [(count.loss, count.samples) for count in self.counts.values()]
        sums = [*(torch.stack([loss, loss.new_tensor(samples)]) for loss, samples in counts)]
        sums.append(torch.tensor([self.timed_samples, 0], dtype=torch.float32, device=self.device))
        *sums, (timed, _) = self.accelerator.reduce(torch.stack(sums), "sum").tolist()
        seconds, counted = time.perf_counter() - self.started, self.counts
        self._clear()
        means = {}
        for (part, count), (loss, samples) in zip(counted.items(), sums, strict=True):
            prefix = "" if part == MODEL else f"{part}_"
            means[f"{prefix}loss" if count.steps else part] = loss / samples
            if count.steps:
                means[f"{prefix}grad_norm"] = count.grad_norm / count.steps
        return {**means, "samples_per_second": timed / self.cp_size / seconds} if means else {}

    def state(self) -> dict[str, dict]:
        """Return the sums since the last `read`, with one loss per process; all processes call it."""
        return {part: self._state(count) for part, count in self.counts.items()}

    def _state(self, count: Count) -> dict:
        losses = self.accelerator.gather(count.loss.reshape(1)).tolist()
        return {"loss": losses, "samples": count.samples, "grad_norm": count.grad_norm, "steps": count.steps}

    def restore(self, state: Mapping[str, Mapping]) -> None:
        """Continue from the sums of `state`; if the number of processes has changed, the first takes all of them."""
        self._clear()
        for part, counted in state.items():
            self._restore(self._count(part), counted)

    def _restore(self, count: Count, counted: Mapping) -> None:
        losses, rank = counted["loss"], self.accelerator.process_index
        if len(losses) == self.accelerator.num_processes:
            count.loss += losses[rank]
            count.samples = counted["samples"]
        elif rank == 0:
            count.loss += sum(losses)
            count.samples = counted["samples"] * len(losses)
        count.grad_norm, count.steps = counted["grad_norm"], counted["steps"]
