"""Rewards, one per file: they score what a model has sampled."""

from .base import Pictures, Reward, Rows, pixels_of

__all__ = ["Pictures", "Reward", "Rows", "pixels_of"]
