"""Loading, data, gradient checkpointing, memory, devices and files: code that does not depend on diffusion."""

from importlib import import_module
from typing import Any

HOMES = {
    "ModelConfig": ".loader",
    "UnifiedDataset": ".data",
    "gradient_checkpoint_forward": ".gradient",
    "load_state_dict": ".loader",
}


def __getattr__(name: str) -> Any:
    # These are imported on first use, because `diffsynth.config` uses `core.files` and must not import torch.
    if name in HOMES:
        return getattr(import_module(HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
