"""`TrainingDefaults`: what a model's YAML says of its trainings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.ranges import BatchSize, LearningRate, Pixels, PositiveInt, Side


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Defaults of trainings of one model, which the configuration may override.

    Args:
        learning_rate: Learning rate of an adapter or a template; 1e-4 is DiffSynth-Studio's.
        full_learning_rate: Learning rate of the model itself (`lora=none`); 1e-5 is DiffSynth-Studio's.
        max_steps: Number of optimizer steps.
        batch_size: Samples per optimizer step, summed over all devices.
        micro_batch_size: Samples per forward on one device; None takes the whole batch.
        validate_every: Optimizer steps between two evaluations; None evaluates before the first and after the last.
        checkpointing: Policy of gradient checkpointing, see `core.memory.MemoryRecipe`.
        max_pixels: Default of `dataset.max_pixels`, the most pixels of a training image.
        division_factor: Default of `dataset.division_factor`, of which both sides of a training image are multiples.
        models: Models that an adapter is trained for, unless the run names others.
        full_models: Models, or parts of one, that are trained in full without an adapter; None takes `models`.
        time_division_factor: The frames of a training video are a multiple of it and one more, as of 4 n + 1 frames.
        lora_target_modules: Layers that LoRA adapts, by model.
        data_file_keys: Columns of the data set that name image files.
        extra_inputs: The columns among them that the pipeline reads as inputs, such as `edit_image`; also `input_image`
            or `end_image`, where a video's own first or last frame is read.
        example: Folder of the model's images in the data set `DiffSynth-Studio/diffsynth_example_dataset`; None if
            it has none.
    """

    learning_rate: LearningRate = 1e-4
    full_learning_rate: LearningRate = 1e-5
    max_steps: PositiveInt = 300
    batch_size: BatchSize = 8
    micro_batch_size: BatchSize | None = 1
    validate_every: PositiveInt | None = 100
    checkpointing: str = "blocks"
    max_pixels: Pixels = 1024 * 1024
    division_factor: Side = 16
    models: Sequence[str] = ("dit",)
    full_models: Sequence[str] | None = None
    time_division_factor: PositiveInt = 4
    lora_target_modules: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    data_file_keys: Sequence[str] = ("image",)
    extra_inputs: Sequence[str] = ()
    example: str | None = None
