"""Choose the device to compute on, and measure the memory that was used."""

import sys

import torch


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used, in GB: GPU memory on a GPU, else host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def choose_device(device: str) -> str:
    """The name of an available device; `auto` takes the first available one of cuda, mps, cpu.

    Raises:
        ValueError: The device is unknown or not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_available in available.items() if is_available]
    if device not in ("auto", *present):
        raise ValueError(f"device={device} is not available here; set device to one of {['auto', *present]}.")
    return present[0] if device == "auto" else device
