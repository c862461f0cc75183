"""How a pipeline is made ready for training, and how far a training is."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .adapters.lora import Adapter
from .base_pipeline import BasePipeline
from .flow_match import TRAINING_STEPS

MODEL = "model"  # name of the part of the parameters that every training has; in a distillation, the student's


class TrainProgress(NamedTuple):
    """Optimizer steps that a training has taken, and how many it will take in all."""

    step: int
    steps: int


def prepare_training(
    pipe: BasePipeline,
    trainable_models: Iterable[str],
    adapter: Adapter | None,
    seed: int,
    trained_dtype: torch.dtype = torch.float32,
) -> None:
    """Make a pipeline with loaded weights ready: set the training noise levels, freeze, inject the adapter.

    Args:
        trainable_models: Models trained in full, converted to `trained_dtype`; everything else is frozen.
        adapter: Injected in fp32; None for none.
        seed: Of the adapter's initial values.
    """
    pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)
    pipe.freeze_except(trainable_models := list(trainable_models))
    for name in trainable_models:
        pipe.named_model(name).to(trained_dtype)
    if adapter is not None:
        adapter.inject(pipe, seed)
