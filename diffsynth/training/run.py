"""The configuration of a training run: one dataclass whose fields are the top level of conf/training.yaml."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Run:
    """One training run, its parts built by the configuration; the fields are the top level of conf/training.yaml.

    Args:
        name: Name of the run.
        output_root, run_dir: Folder of all runs, and the folder of this run in it.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: Seed of all random numbers.
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        dataset: The training data (`core.data.TrainingData`).
        task: The objective (`diffusion.loss.Objective`).
        lora: The adapter (`diffusion.adapters.lora.Adapter`); None trains `task.trainable_models` in full.
        template: The template to train (`diffusion.template.Templates`); None trains no template.
        memory: Options that save memory at the cost of time or precision (`core.memory.MemoryRecipe`).
        optimizer: Called as `optimizer(parameters)`.
        lr_scheduler: Called as `lr_scheduler(optimizer)`; stepped once per optimizer step.
        ema: The moving average of the weights (`training.ema.EMA`); None keeps no average.
        max_steps: Number of optimizer steps; None counts `num_epochs` instead.
        num_epochs: Number of passes over the data set; each pass shows a sample `repeat` times.
        samples: Number of samples to train on, from the beginning of the data set; None trains on all.
        batch_size: Samples per optimizer step, summed over all devices.
        micro_batch_size: Samples per forward pass on one device; None takes the device's whole share of the batch.
        max_grad_norm: The gradient's norm is clipped to this; None does not clip.
        max_bad_steps: The run ends after this many steps in a row whose gradient is not finite.
        validation: What to evaluate, and when (`training.validation.Validation`); None evaluates nothing.
        logger: Writes the metrics (`training.record.numbers.LocalLogger`).
        export: Saves weights for inference (`diffusion.logger.ModelLogger`).
        checkpoint: Saves the state to resume from (`training.checkpoint.Checkpoints`).
        profile: Writes a trace of a few steps (`training.profile.Profile`); None writes none.
        data_report: Describes the data set before the first step (`training.record.data_report.DataReport`).
    """

    name: str
    output_root: str
    run_dir: str
    model: Any
    dataset: Any
    task: Any
    memory: Any
    optimizer: Any
    lr_scheduler: Any
    logger: Any
    export: Any
    checkpoint: Any
    data_report: Any
    lora: Any = None
    template: Any = None
    ema: Any = None
    validation: Any = None
    profile: Any = None
    device: str = "auto"
    seed: int = 0
    max_steps: int | None = None
    num_epochs: float = 1
    samples: int | None = None
    batch_size: int = 1
    micro_batch_size: int | None = None
    max_grad_norm: float | None = None
    max_bad_steps: int = 10

    @property
    def media(self) -> Any:
        """How the model's family reads and writes its images or videos (`diffusion.pipeline.media.Media`)."""
        return self.model.func.__self__.media


@dataclass(kw_only=True)
class DistillRun(Run):
    """A distillation in two stages; its fields are the top level of conf/distill.yaml.

    Args:
        prompts, held_out: Data sets of prompts that the teacher samples images for: to train on, and to validate on.
            None samples no images.
        teacher_path: Folder of two caches of the teacher's images, `train` and `held_out`.
        dataset: Opens the training data; called after the teacher's images have been sampled.
    """

    prompts: Any
    held_out: Any
    teacher_path: str
