"""Loading, data, gradients and memory: everything that knows nothing of diffusion."""

from importlib import import_module

HOMES = {"ModelConfig": ".loader", "UnifiedDataset": ".data", "gradient_checkpoint_forward": ".gradient"}


def __getattr__(name: str):
    # On demand: `config.py` writes files by `core.files` without importing torch.
    if name in HOMES:
        return getattr(import_module(HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
