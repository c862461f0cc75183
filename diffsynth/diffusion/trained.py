"""What is trained: named parts of the parameters, and how far their training is."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .adapters.lora import Adapter
from .base_pipeline import BasePipeline
from .flow_match import TRAINING_STEPS

MODEL = "model"  # the part that every training has; of a distillation, the student


class TrainProgress(NamedTuple):
    """How far a training is: optimizer steps taken, of how many."""

    step: int
    steps: int


def prepare_training(
    pipe: BasePipeline,
    trainable_models: Iterable[str],
    adapter: Adapter | None,
    seed: int,
    trained_dtype: torch.dtype = torch.float32,
) -> None:
    """Set the training noise levels, freeze everything else, inject the adapter: in this order, on loaded weights.

    What is trained becomes `trained_dtype`, adapters always fp32.
    """
    pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)
    pipe.freeze_except(trainable_models := list(trainable_models))
    for name in trainable_models:
        pipe.named_model(name).to(trained_dtype)
    if adapter is not None:
        adapter.inject(pipe, seed)
