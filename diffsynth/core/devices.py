"""Which device there is, and how much of its memory was used."""

import sys

import torch


def peak_memory(device: torch.device) -> float:
    """GB that this process has held at most: of the GPU's memory where it trains on one, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def choose_device(device: str) -> str:
    """The name of a device that is there: `auto` takes the best.

    Raises:
        ValueError: The device is unknown or not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name, present in available.items() if present]
    if device not in ("auto", *there):
        raise ValueError(f"device={device} is not available here; choose one of {['auto', *there]}.")
    return there[0] if device == "auto" else device
