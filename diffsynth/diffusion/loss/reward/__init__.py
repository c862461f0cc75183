"""Objectives that learn what is preferred: from pairs of images, or from a reward, one per file."""

from .dpo import DPO

__all__ = ["DPO"]
