"""Loading, data, gradients and memory: everything that knows nothing of diffusion."""

from .data import UnifiedDataset
from .gradient import gradient_checkpoint_forward
from .loader import ModelConfig

__all__ = ["ModelConfig", "UnifiedDataset", "gradient_checkpoint_forward"]
