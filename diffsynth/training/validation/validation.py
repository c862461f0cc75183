"""Validation: evaluates a run before its first step, every N steps, and after the last.

It measures the held-out loss, samples fixed prompts into a grid of images, and measures metrics of sampled images.
Validation does not change the training: all its noise comes from a seed of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ...core.data import Sample, SampleAddress, TrainingData
from ...core.data.operators.picture_files import read_image
from ...core.files import going_on_without
from ...core.pictures import row, save_animation, save_png, stack
from ...core.ranges import NonNegativeInt, PositiveInt, Seed, check_fields
from ...core.sharing import share
from ...diffusion.adapters.preset import without_preset
from ...diffusion.pipeline.generation import warn_of_ignored, with_images
from ...diffusion.pipeline.remembered import UnitMemory
from ...diffusion.pipeline.request import image_arguments
from ...diffusion.prompts.limits import warn_of_long_prompts
from ...diffusion.randomness import StratifiedRNG
from ...diffusion.rewards import Reward
from .few_steps import FewSteps
from .metrics import Metric

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.base_pipeline import BasePipeline
    from ...diffusion.training_module import PipelineTrainingModule
    from ..absent import NoEMA
    from ..ema import EMA
    from ..state import TrainingState

logger = logging.getLogger(__name__)

BANDS = 4  # a guess: each held-out row is measured once in each of this many equal parts of the timesteps' distribution

MILLISECONDS = 2500  # length of an animation, whatever the clips' length; a guess
OWN_INPUT_ROWS = 4  # a guess: rows of each data set that are sampled if they have such inputs and no number is set


class Shown(NamedTuple):
    """What a validation shows of one result: an image, and of a video some of its frames."""

    thumbnail: Image.Image
    frames: Sequence[Image.Image]


@dataclass
class Validation:
    """Evaluates a run before its first step, after its last, and every `every` steps.

    Args:
        path: Folder of the grids of images.
        every: Optimizer steps between evaluations; None evaluates only before the first step and after the last.
        prompts: Prompts to sample into `step-N.png`; `progress.png` shows all evaluations below one another.
        seed: Seed of all noise in the validation.
        options: Other arguments of the pipeline's call (`num_inference_steps`, `cfg_scale`, `height`, …); images are
            files.
        datasets: Held-out data sets by name; the loss on them is measured.
        loss_samples: Number of the first rows of each data set whose loss is measured.
        metrics: Metrics and rewards of images that are sampled for the rows' prompts, by name.
        metric_samples: Number of the first rows of each data set that are sampled for the metrics.
        row_samples: Number of the first rows of each data set that are sampled into a grid, with their own inputs.
            None samples 4 if the training reads such inputs, those of a template or images, and otherwise none.
        weights: Weights to evaluate: `raw`, their average `ema`, or both; names of the average's metrics start with
            `ema_`.
        few_steps: Compares the student of a distillation with its teacher; None compares nothing.
    """

    path: str | Path
    every: PositiveInt | None = None
    prompts: Sequence[str] = ()
    seed: Seed = 0
    options: Mapping[str, object] = field(default_factory=dict)
    datasets: Mapping[str, TrainingData] = field(default_factory=dict)
    loss_samples: PositiveInt = 64
    metrics: Mapping[str, Metric | Reward] = field(default_factory=dict)
    metric_samples: PositiveInt = 64
    row_samples: NonNegativeInt | None = None
    weights: Sequence[str] = ("raw",)
    few_steps: FewSteps | None = None

    def __post_init__(self):
        check_fields(self, "validation.")

    @property
    def saved(self) -> list[Path]:
        """The pictures that show all evaluations below one another."""
        return sorted(Path(self.path).glob("*progress.png"))

    def models(self, module: "PipelineTrainingModule") -> set[str]:
        """Return the names of the pipeline's models that the validation runs.

        Raises:
            ValueError: The pipeline does not take these options, or `few_steps` cannot compare this task's student.
        """
        try:
            options = with_images(module.pipe, self.options)
            completed = module.pipe.complete(options)
            warn_of_ignored(module.pipe, options, completed)
            warn_of_long_prompts(module.pipe, [{**completed, "prompt": prompt} for prompt in self.prompts])
        except ValueError as error:
            raise ValueError(f"validation.options: {error}") from error
        self._warn_of_bare_prompts(module)
        compared = self.few_steps.models(module) if self.few_steps else set()
        samples_rows = self.metrics or self.shown_rows(module)
        if self.prompts or (samples_rows and self.datasets):
            return compared | module.pipe.models_of(module.pipe.units, model_fn=True)
        encodes = any(dataset.needs_encoders for dataset in self.datasets.values())
        return compared | (module.pipe.models_of(module.units, model_fn=False) if encodes else set())

    def shown_rows(self, module: "PipelineTrainingModule") -> int:
        """How many rows of each data set are sampled to be seen."""
        if self.row_samples is not None:
            return self.row_samples
        return OWN_INPUT_ROWS if module.pipe.template is not None or images_read(module) else 0

    def row_requests(self, module: "PipelineTrainingModule", count: int) -> dict[str, list[dict]]:
        """The requests that sample the first `count` rows of each data set that can be shown, by its name."""
        shown = {name: dataset for name, dataset in self.datasets.items() if self._can_show(dataset, module)}
        return {name: requests_of(first_rows(dataset, count), module) for name, dataset in shown.items()}

    def one_of_each(self, module: "PipelineTrainingModule") -> list[dict]:
        """A request of each kind that is sampled: a row of each data set with its own inputs, and a prompt."""
        is_sampled = self.shown_rows(module) or self.metrics
        rows = self.row_requests(module, 1) if is_sampled else {}
        return [*(request for own in rows.values() for request in own), *({"prompt": p} for p in self.prompts[:1])]

    def _can_show(self, dataset: TrainingData, module: "PipelineTrainingModule") -> bool:
        """Whether rows are sampled of a data set: by default none of a cache, which has no images to go by."""
        return self.row_samples is not None or not images_read(module) or dataset.needs_encoders

    def _warn_of_bare_prompts(self, module: "PipelineTrainingModule") -> None:
        """Log a warning if prompts are sampled without images that the training reads."""
        absent = sorted(name for name in images_read(module) if self.options.get(name) is None)
        if self.prompts and absent:
            rows = ", and to sample rows with their own, set validation.row_samples=4 and validation.datasets, as "
            rows += "validation=emoji_control does"
            if self.datasets and self.shown_rows(module):
                rows = ""
            logger.warning(
                "validation.prompts are sampled without %s, which the training reads. To give all of them one, set "
                "+validation.options.%s=file.png%s.",
                absent[0],
                absent[0],
                rows,
            )

    def due(self, step: int, done: bool) -> bool:
        """Whether the run is evaluated after `step` optimizer steps; `done` after its last one."""
        return step == 0 or done or (self.every is not None and step % self.every == 0)

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that every evaluation returns, for `export.keep_best`."""
        names = [f"{name}_{kind}" for name in self.datasets for kind in ("loss", *self.metrics)]
        names += self.few_steps.metric_names if self.few_steps else []
        prefixes = ["" if weights == "raw" else f"{weights}_" for weights in self.weights]
        return [f"{prefix}{name}" for prefix in prefixes for name in names]

    def check(self, ema: "EMA | NoEMA") -> None:
        """Check `weights`, open the data of `few_steps`, and remove metrics that lack a package or weights.

        A warning names each removed metric.

        Raises:
            ValueError: `weights` names weights that the run does not have, or the cache of `few_steps` is unusable.
        """
        unknown = sorted(set(self.weights) - {"raw", "ema"})
        if unknown:
            raise ValueError(f"validation.weights names {unknown[0]!r}; expected raw, ema or both.")
        if "ema" in self.weights and "ema" not in ema.weights:
            raise ValueError(
                "validation.weights names ema, but the run has no average of its weights; set ema=constant or "
                "ema=power, or set validation.weights=[raw]."
            )
        if not (self.prompts or self.datasets or self.few_steps):
            logger.info(
                'Nothing is evaluated. To sample images while training, set "validation.prompts=[a cat,a dog]".'
            )
        self.metrics = _measurable("validation.metrics", self.metrics)
        if self.few_steps:
            self.few_steps.open()
            self.few_steps.metrics = _measurable("validation.few_steps.metrics", self.few_steps.metrics)

    @torch.no_grad()
    def run(self, accelerator: "Accelerator", state: "TrainingState") -> tuple[dict[str, float], dict[str, Path]]:
        """Evaluate; return the metrics, equal on every process, and the pictures that the first process saved."""
        values, pictures = {}, {}
        module = accelerator.unwrap_model(state.model)
        if self.few_steps and state.step == 0:
            with state.engine.evaluating(), module.pipe.sampling(), without_preset(module.pipe):
                values |= self.few_steps.start(module, self.path)
        for weights in self.weights:
            prefix = "" if weights == "raw" else f"{weights}_"
            with state.using(weights), state.engine.evaluating():
                measured, picture = self._evaluate(accelerator, module, state.step, prefix)
            values |= {f"{prefix}{name}": value for name, value in measured.items()}
            pictures |= picture
        return values, pictures

    def _evaluate(
        self, accelerator: "Accelerator", module: "PipelineTrainingModule", step: int, prefix: str
    ) -> tuple[dict[str, float], dict[str, Path]]:
        """Evaluate one set of weights; `prefix` starts the names of its pictures."""
        values, pictures = {}, {}
        with module.pipe.sampling():
            for name, dataset in self.datasets.items():
                losses = self.losses(module, dataset)
                values |= {f"{name}_{key}": value for key, value in losses.items()}
        with module.pipe.sampling() as pipe, without_preset(pipe):
            for name, dataset in self.datasets.items() if self.metrics else ():
                measured = self.measure(module, dataset)
                values |= {f"{name}_{key}": value for key, value in measured.items()}
            requests = {"": [{"prompt": prompt} for prompt in self.prompts]}
            requests |= {f"{name}_": own for name, own in self.row_requests(module, self.shown_rows(module)).items()}
            for name, own in requests.items():
                shown = self._generate(pipe, own)
                if own and accelerator.is_main_process:
                    captions = [f"{step}: {_caption(request)}" for request in own]
                    picture = row([each.thumbnail for each in shown], captions)
                    pictures |= self._saved(f"{prefix}{name}samples", picture, step, prefix + name)
                    self._save_animation([each.frames for each in shown], captions, step, prefix + name)
            if self.few_steps:
                measured, picture = self.few_steps.evaluate(module, self.path, step)
                values |= measured
                if picture and accelerator.is_main_process:
                    pictures |= self._saved(f"{prefix}few_steps", picture, step, f"{prefix}few_steps_")
        accelerator.wait_for_everyone()
        return values, pictures

    def losses(self, module: "PipelineTrainingModule", dataset: TrainingData) -> dict[str, float]:
        """Return the mean loss of the first rows, its standard error, and the mean loss in each band of timesteps.

        Every row is measured once in each of `BANDS` equal parts of the timesteps' distribution, with fixed noise.
        """
        indices = range(min(self.loss_samples, dataset.size))
        table = torch.tensor(share(indices, lambda mine: [self._row_losses(module, dataset[i], i) for i in mine]))
        rows, bands = table.mean(1), table.mean(0)
        error = (rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else 0.0
        by_band = {f"loss_band{number}": value for number, value in enumerate(bands.tolist(), 1)}
        return {"loss": rows.mean().item(), "loss_error": error, **by_band}

    def _row_losses(self, module: "PipelineTrainingModule", row: dict, index: int) -> list[float]:
        """Return the loss of one row in each band of timesteps."""
        samples = [Sample(row, band, index) for band in range(BANDS)]
        rng = StratifiedRNG(self.seed, [SampleAddress(band, index) for band in range(BANDS)], BANDS)
        return module.loss(samples, rng, UnitMemory(1.0)).tolist()  # the memory encodes the row only once

    def measure(self, module: "PipelineTrainingModule", dataset: TrainingData) -> dict[str, float]:
        """Sample the prompts of the first rows, and return every metric of the results' thumbnails."""
        rows, media, device = first_rows(dataset, self.metric_samples), module.pipe.media, module.pipe.device
        prompts = [row["prompt"] for row in rows]
        targets = [media.thumbnail(row[media.column]) for row in rows]
        images = [shown.thumbnail for shown in self._generate(module.pipe, requests_of(rows, module))]
        values = {name: metric.measure(images, prompts, targets, device) for name, metric in self.metrics.items()}
        return broadcast_object_list([values])[0]  # processes may round differently

    def save(self, picture: Image.Image, step: int, prefix: str = "") -> Path:
        """Save the picture of one evaluation and return its path; all evaluations so far become `progress.png`."""
        newest = Path(self.path) / f"{prefix}step-{step:06d}.png"
        save_png(picture, newest)
        paths = [path for path in sorted(newest.parent.glob(f"{prefix}step-*.png")) if path <= newest]
        save_png(stack([read_image(str(path)) for path in paths]), newest.with_name(f"{prefix}progress.png"))
        return newest

    def _saved(self, name: str, picture: Image.Image, step: int, prefix: str) -> dict[str, Path]:
        """Save a picture and return its path by `name`; nothing if the disk is full."""
        with going_on_without(f"{self.path}/{prefix}step-{step:06d}.png"):
            return {name: self.save(picture, step, prefix)}
        return {}

    def _save_animation(
        self, clips: Sequence[Sequence[Image.Image]], captions: Sequence[str], step: int, prefix: str
    ) -> None:
        """Save clips of one length side by side as an animation; nothing where images are sampled."""
        path = Path(self.path) / f"{prefix}step-{step:06d}.webp"
        if clips[0]:
            with going_on_without(str(path)):
                frames = [row(images, captions) for images in zip(*clips, strict=True)]
                save_animation(frames, path, MILLISECONDS // len(frames))

    def _generate(self, pipe: "BasePipeline", requests: Sequence[Mapping]) -> list["Shown"]:
        """Sample requests, each with its own seed; every process samples some of them and gets what is shown of all."""
        options = with_images(pipe, self.options)
        seeded = [{**options, "seed": self.seed + number, **own} for number, own in enumerate(requests)]
        together = all(own.keys() == {"prompt"} for own in requests)  # other inputs may differ in shape

        def sample(mine: Sequence[Mapping]) -> list[Shown]:
            results = pipe.generate(mine) if together else [pipe.generate([own])[0] for own in mine]
            return [Shown(pipe.media.thumbnail(result), pipe.media.frames(result)) for result in results]

        return share(seeded, sample)


def first_rows(dataset: TrainingData, count: int) -> list[dict]:
    """Return the first `count` rows, or all if there are fewer."""
    return [dataset[index] for index in range(min(count, dataset.size))]


def requests_of(rows: Sequence[Mapping], module: "PipelineTrainingModule") -> list[dict]:
    """Return a sampling request for each row: its prompt and the other columns that training gives the pipeline."""
    read = [name for name in module.extra_inputs if name in module.pipe.arguments]
    names = ["prompt", *(name for name in read if name != "inpaint_mask")]  # inpainting would need an input image
    return [{name: module.pipe.media.read(each, name) for name in names} for each in rows]


def images_read(module: "PipelineTrainingModule") -> set[str]:
    """The images that the training gives the pipeline beside the one to learn, such as `controlnet_image`.

    Masks do not count: without them all of an image is sampled.
    """
    images = {name for name in module.extra_inputs if not name.endswith("mask")}
    return images & image_arguments(module.pipe.request)


def _caption(request: Mapping) -> str:
    """Return the caption of a sampled image: the template's inputs, with files by name, and the prompt."""
    inputs = request.get("template_inputs", {})
    named = (f"{name} {Path(value).name if isinstance(value, str) else value}" for name, value in inputs.items())
    return ", ".join([*named, request["prompt"]])


def _measurable(where: str, metrics: Mapping[str, Metric | Reward]) -> dict[str, Metric | Reward]:
    """Return the metrics that have their packages and weights; log a warning for each of the others."""
    return {name: metric for name, metric in metrics.items() if _can_measure(f"{where}.{name}", metric)}


def _can_measure(name: str, metric: Metric | Reward) -> bool:
    try:
        metric.find()
    except (ImportError, OSError) as error:
        logger.warning("%s is left out: %s", name, error)
        return False
    return True
