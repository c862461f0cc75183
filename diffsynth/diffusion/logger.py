"""What a run leaves behind: weights to use, and numbers."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core.loader import save_safetensors


@dataclass
class ModelLogger:
    """Saves what is trained, by optimizer steps or by epochs.

    Args:
        output_path: Folder of the weights.
        remove_prefix_in_ckpt: Save one file of the trainable tensors under their own names, less this prefix
            (`pipe.dit.`), as the original does; None saves each model under its released names, adapters as diffusers
            loads them.
        save_steps: Optimizer steps between saves, `step-{n}.safetensors`; None saves every epoch,
            `epoch-{i}.safetensors`, and in both cases what the last step leaves.
    """

    output_path: str | Path
    remove_prefix_in_ckpt: str | None = None
    save_steps: int | None = None
    saved: list[Path] = field(default_factory=list, init=False)

    def on_step_end(self, accelerator, model, step: int, epoch: int | None, done: bool) -> None:
        """Save if step or epoch say so; all processes call it.

        Args:
            step: Optimizer steps taken.
            epoch: The pass over the data set, counted from 0, that this step ended; None if it ended none.
            done: Whether this was the last step.
        """
        name = self._name(step, epoch, done)
        if name is not None:
            self.save(accelerator, model, name)

    def save(self, accelerator, model, name: str) -> None:
        """Write `{name}.safetensors`, or `{name}.{model}.safetensors` where several models are trained."""
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        files = self._files(accelerator.unwrap_model(model))
        for part, (tensors, metadata) in files.items():
            suffix = f".{part}" if len(files) > 1 else ""
            path = Path(self.output_path) / f"{name}{suffix}.safetensors"
            save_safetensors(tensors, path, metadata)
            self.saved.append(path)

    def _name(self, step: int, epoch: int | None, done: bool) -> str | None:
        if self.save_steps is None and epoch is not None:
            return f"epoch-{epoch}"
        due = done if self.save_steps is None else (done or step % self.save_steps == 0)
        return f"step-{step}" if due and step > 0 else None

    def _files(self, module) -> Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]:
        if self.remove_prefix_in_ckpt is None:
            return module.export_weights()
        return {"model": (module.export_trainable_state_dict(self.remove_prefix_in_ckpt), {})}


@dataclass
class LocalLogger:
    """Appends numbers to `metrics.jsonl` and shows them on the console.

    Args:
        path: Folder of the file.
        every: Optimizer steps between two lines.
    """

    path: str | Path
    every: int = 10

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"logger.every is {self.every}; expected at least 1.")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of numbers as they are after `step` optimizer steps."""
        Path(self.path).mkdir(parents=True, exist_ok=True)
        with (Path(self.path) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class Meter:
    """Means of what happened since the last reading, over micro-batches and processes."""

    def __init__(self, accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self._clear()

    def _clear(self) -> None:
        self.loss, self.samples = torch.zeros((), device=self.device), 0
        self.grad_norm, self.steps = 0.0, 0
        self.started = time.perf_counter()

    def add_losses(self, losses: Tensor) -> None:
        """Count the losses (b,) of one micro-batch; nothing is read back from the device yet."""
        self.loss += losses.detach().float().sum().to(self.device)
        self.samples += losses.numel()

    def add_step(self, grad_norm: Tensor | float) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.grad_norm = self.grad_norm + grad_norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here, looking and saving, is not training time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """The means since the last call, on every process; starts anew."""
        counted = torch.stack([self.loss, torch.tensor(float(self.samples), device=self.device)])
        loss, samples = self.accelerator.reduce(counted, "sum").tolist()
        seconds = time.perf_counter() - self.started
        grad_norm = float(self.grad_norm) / max(self.steps, 1)
        self._clear()
        return {"loss": loss / samples, "grad_norm": grad_norm, "samples_per_second": samples / seconds}
