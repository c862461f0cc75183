"""Objectives, one file each: `objective(pipe, **inputs)` returns a loss per sample (B,), un-averaged."""

from .autoencoder import AutoencoderLoss
from .base import Objective
from .flow_match_sft import FlowMatchSFT, FlowMatchSFTLoss

__all__ = ["AutoencoderLoss", "FlowMatchSFT", "FlowMatchSFTLoss", "Objective"]
