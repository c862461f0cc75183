"""Trading compute for memory in the backward pass."""

from .checkpoint import checkpoint_blocks, gradient_checkpoint_forward, recomputing_in

__all__ = ["checkpoint_blocks", "gradient_checkpoint_forward", "recomputing_in"]
