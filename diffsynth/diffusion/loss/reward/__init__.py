"""Objectives of reward training, one per file."""

from .awm import AWM
from .base import PolicySampling, RewardObjective
from .nft import NFT
from .rwr import RWR

__all__ = ["AWM", "NFT", "RWR", "PolicySampling", "RewardObjective"]
