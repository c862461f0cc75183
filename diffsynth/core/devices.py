"""Choose the device to compute on, and measure the memory that was used."""

import os
import sys
from pathlib import Path

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


def free_host_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The free bytes of host memory: of the machine, or of a container or job that may take less.

    Args:
        groups, own: Where Linux mounts control groups (cgroups(7)), and the file that names those of this process.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(groups, own)])


def _left_in_groups(groups: Path, own: Path) -> list[int]:
    """The bytes that each limited control group of this process has left, its parents included; none outside Linux."""
    if not own.exists():
        return []
    left = []
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names, root = ("memory.max", "memory.current", "inactive_file"), groups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = groups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        parents = [each for each in (folder, *folder.parents) if each.is_relative_to(root)]
        left += [size for each in parents if (size := _left_in(each, *names)) is not None]
    return left


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """The bytes that a control group has left; None if it sets no limit. The kernel takes cached files back."""
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root group has no such files, and a container may not see its parents
        return None
    return None if most == "max" else max(0, int(most) - int(used) + int(statistics.get(cache, 0)))


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
