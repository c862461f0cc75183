"""How near a few-step student comes to its teacher: both drawn from the same noise, for prompts it never saw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from ...cache.keys import CacheKeys
from ...core.data import CachedDataset, Row, collate
from ...core.loader import load_state_dict, save_safetensors
from ...core.pictures import row, stack
from ...core.sharing import share
from ...diffusion.loss import Distillation
from ...diffusion.pipeline.remembered import to_device
from ...diffusion.pipeline.units import in_groups
from .metrics import Metric


@dataclass
class FewSteps:
    """A student at its own steps beside its teacher, and beside the base at as many steps.

    The base is what the student is before its first step; it follows the path at the family's own noise levels.

    Args:
        dataset: A cache of the teacher's pictures that are not trained on, or what opens one when `open` is called.
        samples: How many of its rows, the first ones, are measured.
        pictures: How many of them are shown.
        batch_size: Rows drawn together, where their sizes agree.
        metrics: What the student's pictures are measured by against the teacher's, by name.
    """

    dataset: CachedDataset | Callable[[], CachedDataset]
    samples: int = 128
    pictures: int = 8
    batch_size: int = 16
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self):
        self.base: list[Tensor] | None = None  # its latents that are shown

    def open(self) -> None:
        """Open the cache.

        Raises:
            ValueError: It is none, it is not finished, or files of it are missing.
        """
        self.rows = self.dataset() if callable(self.dataset) else self.dataset
        if self.rows.needs_encoders:
            raise ValueError(
                f"validation.few_steps.dataset is a {type(self.rows).__name__}; expected a CachedDataset of pictures "
                "that the teacher drew: make_cache.py with this task and held-out prompts makes one."
            )
        self.rows.scan()

    def models(self, module) -> set[str]:
        """The models of the pipeline that have to be loaded for this.

        Raises:
            ValueError: There is no student, or the pictures are not its teacher's.
        """
        if not isinstance(module.task, Distillation):
            raise ValueError(
                f"validation.few_steps compares a student with its teacher; {type(module.task).__name__} has neither. "
                "Choose task=distill, or leave validation.few_steps out."
            )
        self.rows.check_made_for(CacheKeys(module).about())
        decoding = module.pipe.decoding_models if self.pictures or self.metrics else ()
        return {*module.pipe.in_iteration_models, *decoding}

    @property
    def numbers(self) -> list[str]:
        """Names of what every look measures."""
        return ["student_distance", *(f"student_{name}" for name in self.metrics)]

    @property
    def indices(self) -> range:
        return range(min(self.samples, len(self.rows)))

    def start(self, module, folder: str | Path) -> dict[str, float]:
        """Measure the base, without its teacher's guidance and with it, and keep in `folder` what is shown of it.

        To be called before the first step. What is shown is drawn with guidance, where there is any.
        """
        settings, values = {"num_inference_steps": module.task.student.num_inference_steps}, {}
        teacher = module.task.teacher
        guidance = teacher.cfg_scale if teacher else module.task.guidance
        scales = {"base": 1} | ({"base_guided": guidance} if module.task.reads_negative else {})
        for name, scale in scales.items():
            drawn = self.sample(module, {**settings, "cfg_scale": scale})
            values |= self.measure(module.pipe, name, drawn)
        self.base = drawn[: self.pictures]
        if PartialState().is_main_process:
            save_safetensors({str(number): latents for number, latents in enumerate(self.base)}, _kept(folder))
        return values

    def look(self, module, folder: str | Path, step: int) -> tuple[dict[str, float], Image.Image | None]:
        """Measure the student as it is now, and show it below its teacher and the base."""
        drawn = self.sample(module, module.task.student.settings)
        values = self.measure(module.pipe, "student", drawn)
        if self.base is None:
            self.base = broadcast_object_list([_read(_kept(folder))])[0]  # by the first process, for all
        return values, self._show(module, drawn, step) if self.pictures else None

    def sample(self, module, settings: Mapping) -> list[Tensor]:
        """Latents (1, C, h, w), on the host, of each row in turn, from the noise that its teacher started from."""
        module.pipe.progress_bar = iter
        return share(self.indices, lambda mine: self._draw(module, [self.rows[i] for i in mine], settings))

    def _draw(self, module, rows: Sequence[Row], settings: Mapping) -> list[Tensor]:
        def in_batches(alike: Sequence[Row]) -> list[Tensor]:
            starts = range(0, len(alike), self.batch_size)
            batches = [sample_together(module, alike[start : start + self.batch_size], settings) for start in starts]
            return list(torch.cat(batches).cpu().split(1))

        media = module.pipe.media
        return in_groups(rows, [media.size(each[media.column]) for each in rows], in_batches)

    def measure(self, pipe, name: str, drawn: Sequence[Tensor]) -> dict[str, float]:
        """mean ‖x - x_teacher‖² / n over rows of latents of n numbers, its standard error, and every metric."""
        teachers = self._teachers(len(drawn))
        both = zip(drawn, teachers, strict=True)
        distances = torch.stack([(own.float() - other.float()).pow(2).mean() for own, other in both]).double()
        error = (distances.std() / len(distances) ** 0.5).item() if len(distances) > 1 else 0.0
        values = {f"{name}_distance": distances.mean().item(), f"{name}_distance_error": error}
        if self.metrics:
            images, targets = decode(pipe, drawn), decode(pipe, teachers)
            prompts = self._prompts(len(drawn))
            for key, metric in self.metrics.items():
                values[f"{name}_{key}"] = metric.measure(images, prompts, targets, pipe.device)
        return broadcast_object_list([values])[0]  # rounding may differ between processes

    def _show(self, module, drawn: Sequence[Tensor], step: int) -> Image.Image:
        """A column a prompt: teacher, base, student."""
        count = min(self.pictures, len(drawn))
        teachers, prompts = self._teachers(count), self._prompts(count)
        lines = [row(decode(module.pipe, teachers), [f"teacher: {prompt}" for prompt in prompts])]
        base, student = f"base, {module.task.student.num_inference_steps} steps", f"student, step {step}"
        for name, latents in [(base, self.base), (student, drawn[:count])]:
            if latents:
                lines.append(row(decode(module.pipe, latents), [name] * count))
        return stack(lines)

    def _teachers(self, count: int) -> list[Tensor]:
        return [self.rows[index].made["shared"]["input_latents"] for index in range(count)]

    def _prompts(self, count: int) -> list[str]:
        return [self.rows[index]["prompt"] for index in range(count)]


def sample_together(module, rows: Sequence[Row], settings: Mapping) -> Tensor:
    """Latents (B, C, h, w) of rows of one size, drawn with `settings` (`sampling_arguments` of the pipeline)."""
    pipe, sides = module.pipe, zip(*(_inputs_of(module, each) for each in rows), strict=True)
    shared, posi, nega = (to_device(collate(list(side)), pipe.device) for side in sides)
    size = {"height": shared["height"], "width": shared["width"]}
    with pipe.sampling_steps({**size, **settings}):
        return pipe.denoise({**shared, **settings}, posi, nega)


def _inputs_of(module, row: Row) -> list[dict]:
    """The pipeline's inputs, shared, positive and negative, as a training reads them."""
    given = module.get_pipeline_inputs(row)
    return [{**own, **row.made[side]} for own, side in zip(given, ("shared", "posi", "nega"), strict=True)]


def decode(pipe, latents: Sequence[Tensor]) -> list[Image.Image]:
    """Latents (1, C, h, w) each, as pictures."""
    request = pipe.call_defaults
    return share(latents, lambda mine: [pipe.decode(each.to(pipe.device), request) for each in mine])


def _kept(folder: str | Path) -> Path:
    return Path(folder) / "few_steps_base.safetensors"


def _read(path: Path) -> list[Tensor]:
    """The base's latents, in order; none where a run began without."""
    tensors = load_state_dict(path) if path.exists() else {}
    return [tensors[str(number)] for number in range(len(tensors))]
