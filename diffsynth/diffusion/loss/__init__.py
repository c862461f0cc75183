"""Objectives, one file each: `objective(pipe, **inputs)` returns a loss per sample (B,), un-averaged."""

from .autoencoder import AutoencoderLoss
from .base import Moment, Objective
from .direct_distill import DirectDistill, DirectDistillLoss
from .distillation import Distillation, RoleDistillation
from .flow_match_sft import FlowMatchSFT, FlowMatchSFTLoss
from .trajectory import TrajectoryImitation

__all__ = [
    "AutoencoderLoss",
    "DirectDistill",
    "DirectDistillLoss",
    "Distillation",
    "FlowMatchSFT",
    "FlowMatchSFTLoss",
    "Moment",
    "Objective",
    "RoleDistillation",
    "TrajectoryImitation",
]
