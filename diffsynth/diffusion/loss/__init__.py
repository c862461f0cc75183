"""Objectives, one file each: `objective(pipe, **inputs)` returns a loss per sample (B,), un-averaged."""

from .autoencoder import AutoencoderLoss
from .base import Objective
from .direct_distill import DirectDistill, DirectDistillLoss
from .flow_match_sft import FlowMatchSFT, FlowMatchSFTLoss

__all__ = ["AutoencoderLoss", "DirectDistill", "DirectDistillLoss", "FlowMatchSFT", "FlowMatchSFTLoss", "Objective"]
