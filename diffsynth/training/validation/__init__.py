"""Evaluation during a run: held-out losses, sampled pictures, metrics, students beside their teacher."""

from .validation import BANDS, Validation

__all__ = ["BANDS", "Validation"]
