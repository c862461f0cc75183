"""Compares a few-step student with its teacher: both sample held-out prompts from the same noise."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from ...cache.keys import CacheKeys
from ...core.data import CachedDataset, Row, collate
from ...core.data.cache.shards import MALFORMED
from ...core.files import going_on_without
from ...core.loader import load_state_dict, save_safetensors
from ...core.pictures import row, stack
from ...core.ranges import BatchSize, NonNegativeInt, PositiveInt
from ...core.sharing import share
from ...diffusion.loss import Distillation
from ...diffusion.pipeline.remembered import to_device
from ...diffusion.pipeline.units import in_groups
from ...diffusion.rewards import Reward
from .metrics import Metric

if TYPE_CHECKING:
    from ...diffusion.base_pipeline import BasePipeline
    from ...diffusion.training_module import PipelineTrainingModule

logger = logging.getLogger(__name__)


@dataclass
class FewSteps:
    """Compares the student at its own number of steps with its teacher, and with the base at as many steps.

    The base is the student before its first training step; it samples at the family's own noise levels.

    Args:
        dataset: A cache of held-out images that the teacher sampled, or a function that opens one.
        samples: Number of the first rows to measure.
        pictures: Number of the first rows to show as images.
        batch_size: Rows of equal size that are sampled together.
        metrics: Metrics of the student's images against the teacher's, by name.
    """

    dataset: CachedDataset | Callable[[], CachedDataset]
    samples: PositiveInt = 128
    pictures: NonNegativeInt = 8
    batch_size: BatchSize = 16
    metrics: Mapping[str, Metric | Reward] = field(default_factory=dict)

    def __post_init__(self):
        self.base: list[Tensor] | None = None  # the base's latents (1, C, h, w) of the rows that are shown

    def open(self) -> None:
        """Open the cache.

        Raises:
            ValueError: `dataset` is not a cache, or the cache is unfinished or lacks files.
        """
        self.rows = self.dataset() if callable(self.dataset) else self.dataset
        if self.rows.needs_encoders:
            raise ValueError(
                f"validation.few_steps.dataset is a {type(self.rows).__name__}; expected a CachedDataset of images "
                "that the teacher sampled. Run make_cache.py with this task and held-out prompts to make one."
            )
        self.rows.scan()

    def models(self, module: "PipelineTrainingModule") -> set[str]:
        """Return the names of the pipeline's models that this comparison runs.

        Raises:
            ValueError: The task has no student, or the cache was not made by the student's teacher.
        """
        if not isinstance(module.task, Distillation):
            raise ValueError(
                f"validation.few_steps compares a student with its teacher, but {type(module.task).__name__} has "
                "neither; choose task=distill, or leave validation.few_steps out."
            )
        keys = CacheKeys(module)
        self.rows.check_made_for(keys.about, keys.of)
        decoding = module.pipe.decoding_models if self.pictures or self.metrics else ()
        return {*module.pipe.in_iteration_models, *decoding}

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that every evaluation of the student returns."""
        return ["student_distance", *(f"student_{name}" for name in self.metrics)]

    @property
    def indices(self) -> range:
        """Indices of the measured rows."""
        return range(min(self.samples, len(self.rows)))

    def start(self, module: "PipelineTrainingModule", folder: str | Path) -> dict[str, float]:
        """Measure the base before the first step, and save in `folder` its latents of the rows that are shown.

        The base is measured without guidance, and also with the teacher's guidance if there is one; the guided latents
        are shown.
        """
        settings, values = {"num_inference_steps": module.task.student.num_inference_steps}, {}
        teacher = module.task.teacher
        guidance = teacher.cfg_scale if teacher else module.task.guidance
        scales = {"base": 1} | ({"base_guided": guidance} if module.task.reads_negative else {})
        for name, scale in scales.items():
            latents = self.sample(module, {**settings, "cfg_scale": scale})
            values |= self.measure(module.pipe, name, latents)
        self.base = latents[: self.pictures]
        if PartialState().is_main_process:
            with going_on_without(_base_file(folder)):
                save_safetensors({str(number): one for number, one in enumerate(self.base)}, _base_file(folder))
        return values

    def evaluate(
        self, module: "PipelineTrainingModule", folder: str | Path, step: int
    ) -> tuple[dict[str, float], Image.Image | None]:
        """Measure the student at training step `step`; return metrics and a picture of teacher, base and student."""
        latents = self.sample(module, module.task.student.settings)
        values = self.measure(module.pipe, "student", latents)
        if self.base is None:
            self.base = broadcast_object_list([_read(_base_file(folder))])[0]  # the first process reads for all
        return values, self._show(module, latents, step) if self.pictures else None

    def sample(self, module: "PipelineTrainingModule", settings: Mapping) -> list[Tensor]:
        """Sample each measured row from the noise that its teacher started from, and return latents (1, C, h, w).

        The latents are in host memory, on every process.
        """
        return share(self.indices, lambda mine: self._sample_rows(module, [self.rows[i] for i in mine], settings))

    def _sample_rows(self, module: "PipelineTrainingModule", rows: Sequence[Row], settings: Mapping) -> list[Tensor]:
        def in_batches(of_one_size: Sequence[Row]) -> list[Tensor]:
            starts = range(0, len(of_one_size), self.batch_size)
            batches = [of_one_size[start : start + self.batch_size] for start in starts]
            latents = [sample_together(module, batch, settings) for batch in batches]
            return list(torch.cat(latents).cpu().split(1))

        media = module.pipe.media
        return in_groups(rows, [media.size(each[media.column]) for each in rows], in_batches)

    def measure(self, pipe: "BasePipeline", name: str, latents: Sequence[Tensor]) -> dict[str, float]:
        """Return the mean squared distance of latents to the teacher's, its standard error, and every metric.

        The distance of a row is ‖x - x_teacher‖² / n for latents x (1, C, h, w) of n numbers.
        """
        teachers = self._teachers(len(latents))
        both = zip(latents, teachers, strict=True)
        distances = torch.stack([(own.float() - other.float()).pow(2).mean() for own, other in both]).cpu().double()
        error = (distances.std() / len(distances) ** 0.5).item() if len(distances) > 1 else 0.0
        values = {f"{name}_distance": distances.mean().item(), f"{name}_distance_error": error}
        if self.metrics:
            images, targets = thumbnails(pipe, latents), thumbnails(pipe, teachers)
            prompts = self._prompts(len(latents))
            for key, metric in self.metrics.items():
                values[f"{name}_{key}"] = metric.measure(images, prompts, targets, pipe.device)
        return broadcast_object_list([values])[0]  # processes may round differently

    def _show(self, module: "PipelineTrainingModule", latents: Sequence[Tensor], step: int) -> Image.Image:
        """Return a picture with a column per prompt, and the rows teacher, base and student."""
        count = min(self.pictures, len(latents))
        teachers, prompts = self._teachers(count), self._prompts(count)
        lines = [row(thumbnails(module.pipe, teachers), [f"teacher: {prompt}" for prompt in prompts])]
        base, student = f"base, {module.task.student.num_inference_steps} steps", f"student, step {step}"
        for name, shown in [(base, self.base), (student, latents[:count])]:
            if shown:
                lines.append(row(thumbnails(module.pipe, shown), [name] * count))
        return stack(lines)

    def _teachers(self, count: int) -> list[Tensor]:
        """Return the teacher's latents (1, C, h, w) of the first rows."""
        return [self.rows[index].made["shared"]["input_latents"] for index in range(count)]

    def _prompts(self, count: int) -> list[str]:
        return [self.rows[index]["prompt"] for index in range(count)]


def sample_together(module: "PipelineTrainingModule", rows: Sequence[Row], settings: Mapping) -> Tensor:
    """Sample rows of one size as a batch and return latents (B, C, h, w).

    Args:
        settings: Values of the pipeline's `sampling_arguments`.
    """
    pipe, sides = module.pipe, zip(*(_inputs_of(module, each) for each in rows), strict=True)
    shared, posi, nega = (to_device(collate(list(side)), pipe.device) for side in sides)
    size = {"height": shared["height"], "width": shared["width"]}
    with pipe.sampling_steps({**size, **settings}):
        return pipe.denoise({**shared, **settings}, posi, nega)


def _inputs_of(module: "PipelineTrainingModule", row: Row) -> list[dict]:
    """Return the pipeline's shared, positive and negative inputs of a cached row, as training reads them."""
    inputs = module.get_pipeline_inputs(row)
    return [{**own, **row.made[side]} for own, side in zip(inputs, ("shared", "posi", "nega"), strict=True)]


def thumbnails(pipe: "BasePipeline", latents: Sequence[Tensor]) -> list[Image.Image]:
    """Decode latents, (1, …) each, and return the thumbnails of the results."""

    def thumbnail(each: Tensor) -> Image.Image:
        return pipe.media.thumbnail(pipe.decode(each.to(pipe.device), pipe.call_defaults))

    return share(latents, lambda mine: [thumbnail(each) for each in mine])


def _base_file(folder: str | Path) -> Path:
    return Path(folder) / "few_steps_base.safetensors"


def _read(path: Path) -> list[Tensor]:
    """Return the base's saved latents in order; an empty list if there is no file, or a damaged one."""
    try:
        tensors = load_state_dict(path) if path.exists() else {}
        return [tensors[str(number)] for number in range(len(tensors))]
    except (OSError, *MALFORMED) as error:
        logger.warning("%s is damaged, and the base is not shown: %s", path, error)
        return []
