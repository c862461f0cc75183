"""The method: pipelines of units, noise schedules, objectives, adapters. This package knows no particular model.

Shapes in all its docstrings: B batch, L tokens, D width, C channels, T latent frames, h w latent size, H W size in
pixels.
"""

from importlib import import_module

from .base_pipeline import BasePipeline, PipelineUnit, PipelineUnitRunner
from .flow_match import FlowMatchScheduler
from .logger import ModelLogger
from .loss import DirectDistillLoss, FlowMatchSFTLoss
from .training_module import DiffusionTrainingModule

# DiffSynth-Studio's guides import these names from here. They live in packages that import this one, hence the delay.
DEFINED_ABOVE = {"launch_training_task": "training.loop", "launch_data_process_task": "cache.make"}

__all__ = [
    "BasePipeline",
    "DirectDistillLoss",
    "DiffusionTrainingModule",
    "FlowMatchSFTLoss",
    "FlowMatchScheduler",
    "ModelLogger",
    "PipelineUnit",
    "PipelineUnitRunner",
    "launch_data_process_task",
    "launch_training_task",
]


def __getattr__(name: str):
    if name in DEFINED_ABOVE:
        return getattr(import_module(f"diffsynth.{DEFINED_ABOVE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
