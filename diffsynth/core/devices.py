"""Choose the device to compute on, and measure the memory that was used."""

import os
import sys

import psutil
import torch


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has taken, in GB: of a GPU with what its allocator keeps, else host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def set_kernels(deterministic: bool) -> None:
    """Choose kernels: float32 means 32 bits, for convolutions as for products; and results that repeat, if wanted."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_device(device: str) -> str:
    """The name of an available device; `auto` takes the first available one of cuda, mps, cpu.

    Raises:
        ValueError: The device is unknown or not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_available in available.items() if is_available]
    if device.startswith("cuda:"):
        number = device.removeprefix("cuda:")
        raise ValueError(
            f"device={device} names one GPU; expected device=cuda, and the environment names the GPU: type "
            f"CUDA_VISIBLE_DEVICES={number} python … device=cuda"
        )
    if device not in ("auto", *present):
        raise ValueError(f"device={device} is not available here; set device to one of {['auto', *present]}.")
    return present[0] if device == "auto" else device
