"""Looking at a run: held-out loss, fixed prompts drawn into a grid, and whether the prompt decides what is drawn.

Nothing here touches the training: all noise comes from its own seed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ...core.data import Sample, SampleAddress, TrainingData
from ...core.pictures import row, save_png, stack
from ...core.sharing import share
from ...diffusion.pipeline.remembered import UnitMemory
from ...diffusion.randomness import StratifiedRNG
from .few_steps import FewSteps
from .metrics import Metric

if TYPE_CHECKING:
    from ...diffusion.base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

BANDS = 4  # equal parts of the timesteps' distribution, in each of which a held-out row is measured


@dataclass
class Validation:
    """What is looked at, and when: before the first step, after the last, and every `every` steps.

    Args:
        path: Folder of the grids.
        every: Optimizer steps between looks; None looks at the start and the end only.
        prompts: Drawn into `samples/step-N.png`, one row a look in `samples/progress.png`.
        seed: Of all noise here.
        options: Other arguments of the pipeline's call (`num_inference_steps`, `cfg_scale`, `height`, …).
        datasets: Rows to measure the loss on, by name.
        loss_samples: How many rows of each.
        metrics: What drawings of the rows' prompts are measured by, by name.
        metric_samples: How many rows of each are drawn for them.
        row_samples: How many rows of each are sampled to be seen, with their own prompt and inputs.
        template_samples: The same where a template is trained, which reads inputs of theirs.
        weights: Which weights are looked at: `raw`, the average `ema`, or both; names of the latter start with `ema_`.
        few_steps: Compares the student of a distillation with its teacher.
    """

    path: str | Path
    every: int | None = None
    prompts: Sequence[str] = ()
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    datasets: Mapping[str, TrainingData] = field(default_factory=dict)
    loss_samples: int = 64
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    metric_samples: int = 64
    row_samples: int = 0
    template_samples: int = 4
    weights: Sequence[str] = ("raw",)
    few_steps: FewSteps | None = None

    @property
    def saved(self) -> list[Path]:
        """The pictures that show all looks below one another."""
        return sorted(Path(self.path).glob("*progress.png"))

    def models(self, module) -> set[str]:
        """The models of the pipeline that have to be loaded for this.

        Raises:
            ValueError: The pipeline does not take these options, or there is no student of this teacher.
        """
        module.pipe.complete(self.options)
        compared = self.few_steps.models(module) if self.few_steps else set()
        draws_rows = self.metrics or self.shown_rows(module.pipe)
        if self.prompts or (draws_rows and self.datasets):
            return compared | module.pipe.models_of(module.pipe.units, model_fn=True)
        encodes = any(dataset.needs_encoders for dataset in self.datasets.values())
        return compared | (module.pipe.models_of(module.units, model_fn=True) if encodes else set())

    def shown_rows(self, pipe: "BasePipeline") -> int:
        """How many rows of each data set are sampled to be seen."""
        return self.row_samples if pipe.template is None else self.template_samples

    def due(self, step: int, done: bool) -> bool:
        return step == 0 or done or (self.every is not None and step % self.every == 0)

    @property
    def numbers(self) -> list[str]:
        """Names of what is measured."""
        names = [f"{name}_{kind}" for name in self.datasets for kind in ("loss", *self.metrics)]
        names += self.few_steps.numbers if self.few_steps else []
        prefixes = ["" if weights == "raw" else f"{weights}_" for weights in self.weights]
        return [f"{prefix}{name}" for prefix in prefixes for name in names]

    def check(self, ema) -> None:
        """Refuse to look at what is not there, such as an average; name metrics that lack something, and drop them."""
        unknown = sorted(set(self.weights) - {"raw", "ema"})
        if unknown or ("ema" in self.weights and ema is None):
            raise ValueError(
                f"validation.weights is {list(self.weights)}; it may hold raw, and ema where ema=… is chosen."
            )
        self.metrics = _measurable("validation.metrics", self.metrics)
        if self.few_steps:
            self.few_steps.open()
            self.few_steps.metrics = _measurable("validation.few_steps.metrics", self.few_steps.metrics)

    @torch.no_grad()
    def run(self, accelerator, state) -> tuple[dict[str, float], dict[str, Path]]:
        """Measure and draw; returns the numbers, the same on every process, and the pictures that the first saved."""
        values, pictures = {}, {}
        module = accelerator.unwrap_model(state.model)
        if self.few_steps and state.step == 0:
            with state.engine.evaluating(), module.pipe.sampling():
                values |= self.few_steps.start(module, self.path)
        for weights in self.weights:
            prefix = "" if weights == "raw" else f"{weights}_"
            with state.using(weights), state.engine.evaluating():
                measured, picture = self._look(accelerator, module, state.step, prefix)
            values |= {f"{prefix}{name}": value for name, value in measured.items()}
            pictures |= picture
        return values, pictures

    def _look(self, accelerator, module, step: int, prefix: str) -> tuple[dict[str, float], dict[str, Path]]:
        values, pictures = {}, {}
        with module.pipe.sampling() as pipe:
            for name, dataset in self.datasets.items():  # first: drawing changes the noise levels
                losses = self.losses(module, dataset)
                values |= {f"{name}_{key}": value for key, value in losses.items()}
            for name, dataset in self.datasets.items() if self.metrics else ():
                measured = self.measure(module, dataset)
                values |= {f"{name}_{key}": value for key, value in measured.items()}
            requests = {"": [{"prompt": prompt} for prompt in self.prompts]}
            rows = {f"{name}_": first_rows(own, self.shown_rows(pipe)) for name, own in self.datasets.items()}
            requests |= {name: requests_of(own, module) for name, own in rows.items()}
            for name, own in requests.items():
                images = self._generate(pipe, own)
                if own and accelerator.is_main_process:
                    picture = row(images, [f"{step}: {_caption(request)}" for request in own])
                    pictures[f"{prefix}{name}samples"] = self.save(picture, step, prefix + name)
            if self.few_steps:
                measured, picture = self.few_steps.look(module, self.path, step)
                values |= measured
                if picture and accelerator.is_main_process:
                    pictures[f"{prefix}few_steps"] = self.save(picture, step, f"{prefix}few_steps_")
        accelerator.wait_for_everyone()
        return values, pictures

    def losses(self, module, dataset: TrainingData) -> dict[str, float]:
        """The first rows' mean loss, its standard error, and the mean in each quarter of the timesteps.

        Every row is measured once in each of `BANDS` equal parts of the timesteps' distribution, with fixed noise.
        """
        indices = range(min(self.loss_samples, len(dataset)))
        table = torch.tensor(share(indices, lambda mine: [self._row_losses(module, dataset[i], i) for i in mine]))
        rows, bands = table.mean(1), table.mean(0)
        error = (rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else 0.0
        by_band = {f"loss_band{number}": value for number, value in enumerate(bands.tolist(), 1)}
        return {"loss": rows.mean().item(), "loss_error": error, **by_band}

    def _row_losses(self, module, row: dict, index: int) -> list[float]:
        samples = [Sample(row, band, index) for band in range(BANDS)]
        rng = StratifiedRNG(self.seed, [SampleAddress(band, index) for band in range(BANDS)], BANDS)
        return module.loss(samples, rng, UnitMemory(1.0)).double().tolist()  # one encoding for all bands

    def measure(self, module, dataset: TrainingData) -> dict[str, float]:
        """Every metric of drawings of the first rows' prompts."""
        rows, device = first_rows(dataset, self.metric_samples), module.pipe.device
        prompts, targets = ([row[key] for row in rows] for key in ("prompt", module.pipe.media.column))
        drawn = self._generate(module.pipe, requests_of(rows, module))
        values = {name: metric.measure(drawn, prompts, targets, device) for name, metric in self.metrics.items()}
        return broadcast_object_list([values])[0]  # rounding may differ between processes

    def save(self, picture: Image.Image, step: int, prefix: str = "") -> Path:
        """Save the picture of a look, and with those of all earlier looks as `progress.png`; returns the former."""
        newest = Path(self.path) / f"{prefix}step-{step:06d}.png"
        save_png(picture, newest)
        drawn = [path for path in sorted(newest.parent.glob(f"{prefix}step-*.png")) if path <= newest]
        save_png(stack([Image.open(path) for path in drawn]), newest.with_name(f"{prefix}progress.png"))
        return newest

    def _generate(self, pipe, requests: Sequence[Mapping]) -> list[Image.Image]:
        """Draw requests, each with a seed of its own; every process draws a part of them and gets all."""
        pipe.progress_bar = iter
        seeded = [{**self.options, "seed": self.seed + number, **own} for number, own in enumerate(requests)]
        if all(own.keys() == {"prompt"} for own in requests):
            return share(seeded, pipe.generate)
        return share(seeded, lambda mine: [pipe.generate([own])[0] for own in mine])  # inputs may differ in shape


def first_rows(dataset: TrainingData, count: int) -> list[dict]:
    return [dataset[index] for index in range(min(count, len(dataset)))]


def requests_of(rows: Sequence[Mapping], module) -> list[dict]:
    """What draws rows: their prompts, and what else of them the training's pipeline reads."""
    read = [name for name in module.extra_inputs if name in module.pipe.arguments]
    names = ["prompt", *(name for name in read if name != "inpaint_mask")]  # which needs a picture to start from
    return [{name: each[name] for name in names} for each in rows]


def _caption(request: Mapping) -> str:
    inputs = request.get("template_inputs", {})
    named = (f"{name} {Path(value).name if isinstance(value, str) else value}" for name, value in inputs.items())
    return ", ".join([*named, request["prompt"]])


def _measurable(where: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if _can_measure(f"{where}.{name}", metric)}


def _can_measure(name: str, metric: Metric) -> bool:
    try:
        metric.find()
    except (ImportError, OSError) as error:
        logger.warning("%s is left out: %s", name, error)
        return False
    return True
