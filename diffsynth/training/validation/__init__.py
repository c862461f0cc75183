"""Evaluation during a run: held-out losses, sampled images, metrics of them, and students compared with teachers."""

from .validation import BANDS, Validation

__all__ = ["BANDS", "Validation"]
