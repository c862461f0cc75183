"""The name of the trained part that every training has, and how far a training is."""

from typing import NamedTuple

MODEL = "model"  # name of the part of the parameters that every training has; in a distillation, the student's


class TrainProgress(NamedTuple):
    """Optimizer steps that a training has taken, and how many it will take in all."""

    step: int
    steps: int
