"""`ModelLogger`: exports the weights of a training as safetensors files to use elsewhere."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from ..core.files import going_on_without, write_text
from ..core.json_text import read_json, to_json
from ..core.loader import save_safetensors
from ..core.masking import in_strings, masked_values, without_folders
from ..core.ranges import PositiveInt, check_fields
from .adapters.formats import ADAPTER_FILE, FORMATS, check_holds
from .pipeline.sampling_settings import METADATA_KEY

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .adapters.lora import Adapter
    from .base_pipeline import BasePipeline
    from .training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?:(?:step|epoch)-(\d+)|best)\b")


@dataclass
class ModelLogger:
    """Exports the trained weights every N optimizer steps, or every epoch.

    Args:
        output_path: Folder of the exported files.
        remove_prefix_in_ckpt: Save all trainable tensors in one file, under their own names without this prefix
            (`pipe.dit.`), as DiffSynth-Studio does. None saves a file per model, under the names of its released
            checkpoint, and adapters under the names of `formats`.
        save_steps: Optimizer steps between exports, `step-{n}.safetensors`. None exports after every epoch,
            `epoch-{i}.safetensors`. The last step is exported in both cases.
        formats: Formats of adapter files, keys of `adapters.formats.FORMATS`; with several, files are named
            `step-{n}.{format}.safetensors`.
        trigger_prompts: Prompts that show what was trained; they are written into the metadata.
        keep_best: Name of a metric of validation, such as `held_out_loss`; the weights with its lowest value are kept
            as `best.safetensors`.
    """

    output_path: str | Path
    remove_prefix_in_ckpt: str | None = None
    save_steps: PositiveInt | None = None
    formats: Sequence[str] = ("common",)
    trigger_prompts: Sequence[str] = ()
    keep_best: str | None = None

    def __post_init__(self):
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown or not self.formats:
            raise ValueError(f"export.formats is {list(self.formats)}; expected some of {list(FORMATS)}.")
        check_fields(self, "export.")

    def check(self, measured: Sequence[str]) -> None:
        """Refuse a `keep_best` that is not among the metrics that validation measures."""
        if self.keep_best is not None and self.keep_best not in measured:
            known = ", ".join(measured)
            remedy = f"set export.keep_best to one of {known}" if known else "choose an option of validation"
            raise ValueError(f"export.keep_best is {self.keep_best!r}, which validation does not measure; {remedy}.")

    def check_formats(self, lora: "Adapter | None", pipeline: type["BasePipeline"]) -> None:
        """Check that every save can write every one of `formats`.

        Args:
            lora: The run's adapter; None trains models in full, whose files have the names of released checkpoints.
            pipeline: The model's family.

        Raises:
            ValueError: A format has no names for the adapter, or there is no adapter to write in another format.
        """
        if self.remove_prefix_in_ckpt is not None:
            return
        if lora is None and not {*self.formats} <= {"common", "diffusers"}:
            raise ValueError(
                f"export.formats is {list(self.formats)}, which are formats of adapters, but this run trains models in "
                "full (lora=none); leave export.formats out."
            )
        prefixes = {name: network.lora.written for name, network in pipeline.networks().items() if network.lora}
        for model in lora.models if lora else ():
            for format in self.formats:
                check_holds(format, lora.peft_config([]), prefixes.get(model, model))

    @property
    def saved(self) -> list[Path]:
        """The exported files in order, those from before the run was resumed included."""
        files = Path(self.output_path).glob("*.safetensors")
        return sorted((path for path in files if NAME.match(path.name)), key=_by_number)

    def on_step_end(
        self,
        accelerator: "Accelerator",
        model: nn.Module,
        step: int,
        epoch: int | None,
        done: bool,
        measured: Mapping[str, float] | None = None,
        weights: str = "raw",
    ) -> None:
        """Export if the step, the epoch or a new best value says so; all processes call this.

        A full disk is a warning, because there may be room again at the next export; at the last step it is an error.

        Args:
            model: The training module, wrapped by `accelerator` or not.
            step: Number of optimizer steps taken.
            epoch: Number, from 0, of the epoch that ended with this step; None if none did.
            done: Whether this was the last step.
            measured: Metrics of this step, by name.
            weights: The kind of weights that the model holds now, `raw` or their average `ema`.
        """
        name = self._name(step, epoch, done)
        if name is not None:
            self.save(accelerator, model, name if weights == "raw" else f"{name}.{weights}", done)
        best_is_of_ema = (self.keep_best or "").startswith("ema_")
        if self.keep_best in (measured or {}) and best_is_of_ema == (weights == "ema"):
            self._keep_best(accelerator, model, step, measured[self.keep_best], done)

    def due(self, step: int, epoch: int | None, done: bool, measured: Mapping[str, float]) -> bool:
        """Whether `on_step_end` may export at this step."""
        return self._name(step, epoch, done) is not None or self.keep_best in measured

    def _keep_best(self, accelerator: "Accelerator", model: nn.Module, step: int, value: float, is_last: bool) -> None:
        record = Path(self.output_path) / "best.json"
        saved = read_json(record).get("value")
        best = saved if isinstance(saved, int | float) else math.inf
        accelerator.wait_for_everyone()  # every process reads the record before the main one writes it
        if value < best and accelerator.is_main_process:
            with self._unless(is_last, "best"):
                self._write(accelerator.unwrap_model(model), "best")
                write_text(record, to_json({"step": step, "name": self.keep_best, "value": value}))

    def save(self, accelerator: "Accelerator", model: nn.Module, name: str, is_last: bool = True) -> None:
        """Write `{name}.safetensors`, or `{name}.{model}.safetensors` where several models are trained.

        Adapter files are read back and compared with the trained adapter. A file that differs is kept, and an error is
        logged.

        Args:
            is_last: Whether a full disk is an error, rather than a warning.
        """
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with self._unless(is_last, name):
                self._write(accelerator.unwrap_model(model), name)

    def _unless(self, is_last: bool, name: str) -> AbstractContextManager:
        """Inside, a full disk is a warning, unless this is the last export."""
        return nullcontext() if is_last else going_on_without(Path(self.output_path) / f"{name}.safetensors")

    def _write(self, module: "DiffusionTrainingModule", name: str) -> None:
        if self.remove_prefix_in_ckpt is not None:
            tensors = module.export_trainable_state_dict(self.remove_prefix_in_ckpt)
            path = Path(self.output_path) / f"{name}.safetensors"
            return save_safetensors(tensors, path, self._about(module, is_adapter=False))
        for format in self.formats:
            self._save(module, name, format)

    def _save(self, module: "DiffusionTrainingModule", name: str, format: str) -> None:
        files = module.export_weights(format)
        for part, (tensors, metadata) in files.items():
            is_adapter = part.startswith(ADAPTER_FILE)
            if not is_adapter and format != self.formats[0]:
                continue
            stems = [name, part if len(files) > 1 else "", format if is_adapter and len(self.formats) > 1 else ""]
            path = Path(self.output_path) / f"{'.'.join(filter(None, stems))}.safetensors"
            save_safetensors(tensors, path, {**metadata, **self._about(module, is_adapter)})
            if is_adapter and module.is_whole:  # one process cannot call a layer whose weights are split
                self._check(module, path)

    def _about(self, module: "DiffusionTrainingModule", is_adapter: bool) -> dict[str, str]:
        """Metadata of a file, for anyone: the base model, the configuration, the adapter, the sampling settings."""
        about = {"base_model": _for_others(module.pipe.sources()), "trigger_prompts": self._shown_prompts()}
        about |= {"sampling": module.sampling_settings} if module.sampling_settings else {}
        config = Path(self.output_path).parent / "config.yaml"
        about["config"] = _shown_config(config.read_text(encoding="utf-8")) if config.exists() else None
        about |= module.describe_adapters() if is_adapter else {}
        return {METADATA_KEY: to_json(about)}

    def _shown_prompts(self) -> list[str]:
        """Return `trigger_prompts` for anyone, as the run recorded them: with the environment's variables by name."""
        resolved = Path(self.output_path).parent / "resolved.yaml"
        saved = yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.exists() else {}
        return _for_others(saved.get("export", {}).get("trigger_prompts", list(self.trigger_prompts)))

    def _check(self, module: "DiffusionTrainingModule", path: Path) -> None:
        try:
            module.check_export(path)
        except ValueError as error:
            logger.error("THIS EXPORT IS WRONG; the file is kept, so that you can look into it: %s", error)

    def _name(self, step: int, epoch: int | None, done: bool) -> str | None:
        if self.save_steps is None and epoch is not None:
            return f"epoch-{epoch}"
        due = done if self.save_steps is None else (done or step % self.save_steps == 0)
        return f"step-{step}" if due and step > 0 else None


def _for_others(value: Any) -> Any:
    """Nested dicts and lists without credentials and folders."""
    return in_strings(without_folders, masked_values(value))


def _shown_config(config: str) -> str:
    """A run's configuration as it was composed, for anyone, and without Hydra's own settings."""
    nodes = {name: node for name, node in yaml.safe_load(config).items() if name != "hydra"}
    return yaml.safe_dump(_for_others(nodes), sort_keys=False, allow_unicode=True)


def _by_number(path: Path) -> tuple[int, str]:
    """Sort key: by step or epoch, `best` first."""
    return int(NAME.match(path.name)[1] or -1), path.name
