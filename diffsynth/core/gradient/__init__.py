"""Gradient checkpointing and activation offloading: less memory for activations, more time for a step."""

from .checkpoint import checkpoint_blocks, gradient_checkpoint_forward, is_checkpointed, recomputing_in
from .policies import check_policy, follow, honoured_policies, repeated_blocks, repeated_lists

__all__ = [
    "check_policy",
    "checkpoint_blocks",
    "follow",
    "gradient_checkpoint_forward",
    "honoured_policies",
    "is_checkpointed",
    "recomputing_in",
    "repeated_blocks",
    "repeated_lists",
]
