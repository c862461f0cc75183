"""What a run leaves behind: weights to use."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import write_text
from ..core.loader import save_safetensors
from .adapters.formats import FORMATS
from .pipeline.sampling_settings import METADATA_KEY

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
