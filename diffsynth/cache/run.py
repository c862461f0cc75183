"""The configuration of make_cache.py, and `ModelRun`, the fields that it shares with a training's."""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from ..core.ranges import BatchSize, PositiveInt, Seed

Command = Literal["make", "verify", "stats", "gc"]
COMMANDS = get_args(Command)


AnyRun = TypeVar("AnyRun", bound="ModelRun")


@dataclass(kw_only=True)
class ModelRun:
    """A run that prepares data for a model: to cache it, or to train on it.

    Args:
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        dataset: The data (`core.data.TrainingData`).
        task: The objective (`diffusion.loss.Objective`).
        lora: The adapter (`diffusion.adapters.lora.Adapter`); None trains `task.trainable_models` in full.
        template: The template to train (`diffusion.template.Templates`); None trains no template.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: Seed of all random numbers, a template's initial weights among them.
    """

    model: Any
    dataset: Any
    task: Any
    lora: Any = None
    template: Any = None
    device: str = "auto"
    seed: Seed = 0

    @property
    def media(self) -> Any:
        """How the model's family reads and writes its images or videos (`diffusion.pipeline.media.Media`)."""
        return self.model.func.__self__.media

    @property
    def latents(self) -> Any:
        """The latents of the model's family (`diffusion.pipeline.vae.Latents`)."""
        return self.model.func.__self__.latents

    def with_template(self: AnyRun) -> AnyRun:
        """Return the same run with its template loaded, which imports the template's code."""
        return replace(self, template=self.template and self.template.load_one(self.seed))


@dataclass(kw_only=True)
class CacheRun(ModelRun):
    """One command on one cache; its fields are the top level of conf/make_cache.yaml.

    Args:
        path: Folder of the cache.
        command: `make` makes or completes the cache, `verify` compares it with its data and models, `stats` counts its
            content, and `gc` deletes entries that no sample needs.
        batch_size: Samples per forward pass of an encoder.
        shard_megabytes: Size of a shard file, in MiB.

    The other arguments are those of `ModelRun`; all but `device` must equal those of the training that reads the cache.
    """

    path: str
    command: Command = "make"
    batch_size: BatchSize = 8
    shard_megabytes: PositiveInt = 256
