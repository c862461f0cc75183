"""What a run leaves behind: weights to use, and numbers."""

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor

from ..core.files import forget_after, write_text
from ..core.loader import save_safetensors
from .lora_formats import FORMATS
from .loss.base import MODEL
from .sampling_settings import METADATA_KEY
from .trackers import Tracker

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?:(?:step|epoch)-(\d+)|best)\b")


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
        formats: Names that adapters are saved under, of `lora_formats.FORMATS`; with several, the file is named
            `step-{n}.{format}.safetensors`.
        trigger_prompts: Written into the files.
        keep_best: Name of a number that validation measures, such as `held_out_loss`; the weights at its lowest are
            kept as `best.safetensors`.
    """

    output_path: str | Path
    remove_prefix_in_ckpt: str | None = None
    save_steps: int | None = None
    formats: Sequence[str] = ("diffusers",)
    trigger_prompts: Sequence[str] = ()
    keep_best: str | None = None

    def __post_init__(self):
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown or not self.formats:
            raise ValueError(f"export.formats is {list(self.formats)}; expected some of {list(FORMATS)}.")

    def check(self, measured: Sequence[str]) -> None:
        """Refuse to keep the best by a number that is not among those measured."""
        if self.keep_best is not None and self.keep_best not in measured:
            raise ValueError(
                f"export.keep_best is {self.keep_best!r}; validation measures {list(measured) or 'nothing'}."
            )

    @property
    def saved(self) -> list[Path]:
        """The files there are, also of earlier parts of a run that was taken up again."""
        files = Path(self.output_path).glob("*.safetensors")
        return sorted((path for path in files if NAME.match(path.name)), key=_by_number)

    def on_step_end(
        self,
        accelerator,
        model,
        step: int,
        epoch: int | None,
        done: bool,
        measured: Mapping[str, float] | None = None,
        weights: str = "raw",
    ) -> None:
        """Save if step, epoch or what was measured say so; all processes call it.

        Args:
            step: Optimizer steps taken.
            epoch: The pass over the data set, counted from 0, that this step ended; None if it ended none.
            done: Whether this was the last step.
            measured: Numbers of this step, by name.
            weights: What the model holds now, `raw` weights or their average `ema`.
        """
        name = self._name(step, epoch, done)
        if name is not None:
            self.save(accelerator, model, name if weights == "raw" else f"{name}.{weights}")
        of_average = (self.keep_best or "").startswith("ema_")
        if self.keep_best in (measured or {}) and of_average == (weights == "ema"):
            self._keep_best(accelerator, model, step, measured[self.keep_best])

    def due(self, step: int, epoch: int | None, done: bool, measured: Mapping[str, float]) -> bool:
        """Whether `on_step_end` may save anything of this step."""
        return self._name(step, epoch, done) is not None or self.keep_best in measured

    def _keep_best(self, accelerator, model, step: int, value: float) -> None:
        record = Path(self.output_path) / "best.json"
        best = json.loads(record.read_text(encoding="utf-8"))["value"] if record.exists() else math.inf
        accelerator.wait_for_everyone()  # all have read before the first writes
        if value < best:
            self.save(accelerator, model, "best")
            if accelerator.is_main_process:
                write_text(record, json.dumps({"step": step, "name": self.keep_best, "value": value}))

    def save(self, accelerator, model, name: str) -> None:
        """Write `{name}.safetensors`, or `{name}.{model}.safetensors` where several models are trained.

        Adapter files are read back and compared with what was trained; one that differs is named loudly and kept.
        """
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        module = accelerator.unwrap_model(model)
        if self.remove_prefix_in_ckpt is not None:
            tensors = module.export_trainable_state_dict(self.remove_prefix_in_ckpt)
            path = Path(self.output_path) / f"{name}.safetensors"
            return save_safetensors(tensors, path, self._about(module, is_adapter=False))
        for format in self.formats:
            self._save(module, name, format)

    def _save(self, module, name: str, format: str) -> None:
        files = module.export_weights(format)
        for part, (tensors, metadata) in files.items():
            is_adapter = part == "lora"
            if not is_adapter and format != self.formats[0]:
                continue
            marks = [name, part if len(files) > 1 else "", format if is_adapter and len(self.formats) > 1 else ""]
            path = Path(self.output_path) / f"{'.'.join(filter(None, marks))}.safetensors"
            save_safetensors(tensors, path, {**metadata, **self._about(module, is_adapter)})
            if is_adapter and module.is_whole:  # a layer in parts cannot be called by one process
                self._check(module, path)

    def _about(self, module, is_adapter: bool) -> dict[str, str]:
        """What the file's metadata says of where it comes from and how it is to be drawn."""
        about = {"base_model": module.pipe.sources(), "trigger_prompts": list(self.trigger_prompts)}
        about |= {"sampling": module.sampling} if module.sampling else {}
        config = Path(self.output_path).parent / "resolved.yaml"
        about["config"] = config.read_text(encoding="utf-8") if config.exists() else None
        about |= module.describe_adapters() if is_adapter else {}
        return {METADATA_KEY: json.dumps(about)}

    def _check(self, module, path: Path) -> None:
        try:
            module.check_export(path)
        except ValueError as error:
            logger.error("THIS EXPORT IS WRONG, and is kept to be looked at: %s", error)

    def _name(self, step: int, epoch: int | None, done: bool) -> str | None:
        if self.save_steps is None and epoch is not None:
            return f"epoch-{epoch}"
        due = done if self.save_steps is None else (done or step % self.save_steps == 0)
        return f"step-{step}" if due and step > 0 else None


def _by_number(path: Path) -> tuple[int, str]:
    """By step or epoch; `best` stands first."""
    return int(NAME.match(path.name)[1] or -1), path.name


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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of numbers as they are after `step` optimizer steps."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers.values():
            tracker.log(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Hand on a picture that lies in the run's folder."""
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


@dataclass
class Count:
    """What was counted of one kind of step; `loss` is a sum over samples, `grad_norm` one over steps."""

    loss: Tensor
    samples: int = 0
    grad_norm: float = 0.0
    steps: int = 0


class Meter:
    """Means of what happened since the last reading, over steps, micro-batches and processes.

    Steps that train another part than the model count under its name, `fake_score_loss`.

    Args:
        cp_size: Processes that count the same samples.
    """

    def __init__(self, accelerator, cp_size: int = 1):
        self.accelerator, self.device, self.cp_size = accelerator, accelerator.device, cp_size
        self.losses: list[Tensor] = []  # of the step that is being taken
        self._clear()

    def _clear(self) -> None:
        self.counts: dict[str, Count] = {}  # by the part that was trained
        self.started, self.timed_samples = time.perf_counter(), 0

    def _count(self, part: str) -> Count:
        return self.counts.setdefault(part, Count(torch.zeros((), device=self.device)))

    def add_losses(self, losses: Tensor) -> None:
        """Count the losses (b,) of one micro-batch; nothing is read back from the device yet."""
        self.losses.append(losses.detach().float().reshape(-1).to(self.device))

    def end_step(self, grad_norm: float | None, part: str = MODEL) -> None:
        """Count one optimizer step; one that was left out (None) counts for nothing but time."""
        if grad_norm is not None:
            count = self._count(part)
            count.steps += 1
            count.grad_norm += grad_norm
            for losses in self.losses:
                count.loss += losses.sum()
                count.samples += losses.numel()
                self.timed_samples += losses.numel()
        self.losses = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here, looking and saving, is not training time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """The means since the last call, on every process; starts anew."""
        counts = [(count.loss, count.samples) for count in self.counts.values()]
        sums = [*(torch.stack([loss, loss.new_tensor(samples)]) for loss, samples in counts)]
        sums.append(torch.tensor([self.timed_samples, 0], dtype=torch.float32, device=self.device))
        *sums, (timed, _) = self.accelerator.reduce(torch.stack(sums), "sum").tolist()
        seconds, counted = time.perf_counter() - self.started, self.counts
        self._clear()
        means = {}
        for (part, count), (loss, samples) in zip(counted.items(), sums, strict=True):
            prefix = "" if part == MODEL else f"{part}_"
            means |= {f"{prefix}loss": loss / samples, f"{prefix}grad_norm": count.grad_norm / count.steps}
        return {**means, "samples_per_second": timed / self.cp_size / seconds} if means else {}

    def state(self) -> dict[str, dict]:
        """What was counted since the last reading, process by process; all processes call it."""
        return {part: self._state(count) for part, count in self.counts.items()}

    def _state(self, count: Count) -> dict:
        losses = self.accelerator.gather(count.loss.reshape(1)).tolist()
        return {"loss": losses, "samples": count.samples, "grad_norm": count.grad_norm, "steps": count.steps}

    def restore(self, state: Mapping[str, Mapping]) -> None:
        """Go on counting from `state`; with another number of processes, the first takes over what all had."""
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
