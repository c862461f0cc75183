"""The method: pipelines as units, noise schedules, objectives, adapters. Names no model."""

from importlib import import_module

from .base_pipeline import BasePipeline, PipelineUnit, PipelineUnitRunner
from .flow_match import FlowMatchScheduler
from .logger import ModelLogger
from .loss import FlowMatchSFTLoss
from .training_module import DiffusionTrainingModule

# The guides import these from here; the packages above this one are imported only when they are asked for.
ABOVE = {"launch_training_task": "training.loop", "launch_data_process_task": "cache.make"}

__all__ = [
    "BasePipeline",
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
    if name in ABOVE:
        return getattr(import_module(f"diffsynth.{ABOVE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
