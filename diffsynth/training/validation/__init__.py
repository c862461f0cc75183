"""Evaluation during a run: held-out losses, sampled pictures, metrics, students beside their teacher."""
