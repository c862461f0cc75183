"""What a training is made of: the top level of its configuration."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Run:
    """One training, as its configuration built it; the fields are the top level of conf/training.yaml.

    Args:
        name: What the run is called.
        output_root, run_dir: Folder of all runs, and the folder of this one in it.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: Of everything that is random.
        model: Builds the pipeline: `from_components` of a family, with its arguments but the device.
        dataset: What is trained on (`core.data.TrainingData`).
        task: The objective (`diffusion.loss.Objective`).
        lora: The adapter (`diffusion.adapters.lora.Adapter`); None trains `task.trainable_models` in full.
        template: The template that is trained (`diffusion.template.Templates`); None for none.
        memory: What is traded for memory (`core.memory.MemoryRecipe`).
        optimizer: `optimizer(parameters)`.
        lr_scheduler: `lr_scheduler(optimizer)`, stepped once an optimizer step.
        ema: Average of the weights (`training.ema.EMA`); None for none.
        max_steps: Optimizer steps; None counts `num_epochs` instead.
        num_epochs: Passes over the data set, times its `repeat`.
        samples: How many samples of the data set are trained on, the first ones; None for all.
        batch_size: Samples an optimizer step, over all devices.
        micro_batch_size: Samples a forward on one device; None takes all at once.
        max_grad_norm: Limit of the gradient's norm; None does not clip.
        max_bad_steps: So many steps in a row with a gradient that is not finite end the run.
        validation: What is evaluated, and when (`training.validation.Validation`); None evaluates nothing.
        logger: Where numbers go (`training.record.numbers.LocalLogger`).
        export: Weights to use (`diffusion.logger.ModelLogger`).
        checkpoint: State to resume from (`training.checkpoint.Checkpoints`).
        profile: Writes a trace of a few steps (`training.profile.Profile`); None writes none.
        data_report: What is written down about the data before the first step (`training.record.data_report`).
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
        """What the model's family makes (`diffusion.pipeline.media.Media`)."""
        return self.model.func.__self__.media


@dataclass(kw_only=True)
class DistillRun(Run):
    """A distillation in two stages; the fields are the top level of conf/distill.yaml.

    Args:
        prompts, held_out: Data sets of prompts, for the training and for the validation; None samples nothing.
        teacher_path: Folder of the teacher's pictures, in the caches `train` and `held_out`.
        dataset: Opens what is trained on; called when the pictures are there.
    """

    prompts: Any
    held_out: Any
    teacher_path: str
