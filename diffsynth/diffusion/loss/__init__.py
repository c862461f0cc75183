"""Objectives, one per file: `objective(pipe, **inputs)` returns a loss per sample (B,), not averaged."""

from ..trained import TrainProgress
from .add import AdversarialDistillation
from .autoencoder import AutoencoderLoss
from .base import Objective
from .direct_distill import DirectDistill, DirectDistillLoss
from .distillation import Distillation, RoleDistillation
from .dmd2 import DMD2
from .flow_match_sft import FlowMatchSFT, FlowMatchSFTLoss
from .hyper_sd import HyperSD
from .lcm import LatentConsistency
from .mask_weights import MaskWeights
from .prior import Prior, PriorPreservation
from .slider import ConceptSlider
from .trajectory import TrajectoryImitation

__all__ = [
    "AdversarialDistillation",
    "HyperSD",
    "LatentConsistency",
    "AutoencoderLoss",
    "ConceptSlider",
    "DMD2",
    "DirectDistill",
    "DirectDistillLoss",
    "Distillation",
    "FlowMatchSFT",
    "FlowMatchSFTLoss",
    "MaskWeights",
    "TrainProgress",
    "Objective",
    "Prior",
    "PriorPreservation",
    "RoleDistillation",
    "TrajectoryImitation",
]
