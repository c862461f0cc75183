"""The method: pipelines as units, noise schedules, objectives, adapters and the training loop. Names no model."""

from .base_pipeline import BasePipeline, PipelineUnit, PipelineUnitRunner
from .flow_match import FlowMatchScheduler
from .logger import ModelLogger
from .loss import FlowMatchSFTLoss
from .runner import launch_training_task
from .training_module import DiffusionTrainingModule

__all__ = [
    "BasePipeline",
    "DiffusionTrainingModule",
    "FlowMatchSFTLoss",
    "FlowMatchScheduler",
    "ModelLogger",
    "PipelineUnit",
    "PipelineUnitRunner",
    "launch_training_task",
]
