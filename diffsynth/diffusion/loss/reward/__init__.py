"""Objectives that learn what is preferred: from pairs of images, or from rewards of samples, one per file."""

from .awm import AWM
from .base import PolicySampling, RewardObjective
from .dpo import DPO
from .flow_grpo import FlowGRPO
from .nft import NFT
from .refl import ReFL
from .rwr import RWR

__all__ = ["AWM", "DPO", "FlowGRPO", "NFT", "RWR", "PolicySampling", "ReFL", "RewardObjective"]
