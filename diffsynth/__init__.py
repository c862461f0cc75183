"""One trainer for diffusion models, in which every experiment is a Hydra composition."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # DiffSynth-Studio's scripts import `load_state_dict` and `ModelConfig` from here; `core` imports them on first use.
    from . import core

    if name in core.HOMES:
        return getattr(core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
