"""Copies between device and host memory: all offloading and streaming goes through these functions.

On CUDA, host memory is pinned and copies run in a CUDA stream of their own. On other devices host and device are the
same memory; the copies are made all the same, so that the code can be tested there.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .live_bytes import in_host_memory

ALIGNMENT = 256  # bytes; CUDA's own allocations have it (CUDA C++ Programming Guide, "Device Memory Accesses")


def empty(size: int, device: torch.device) -> Tensor:
    """An empty uint8 buffer of `size` bytes (size,) in host memory, pinned if `device` is a GPU."""
    with in_host_memory():
        buffer = torch.empty(size, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
    if device.type == "cuda":
        _pin(buffer)
    return buffer


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor of any shape in host memory; from CUDA an asynchronous one, in the current stream."""
    device = "meta" if tensor.device.type == "meta" else "cpu"
    with in_host_memory():
        copy = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=tensor.is_cuda)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor of any shape in host memory; to CUDA an asynchronous one."""
    return tensor.to(device, non_blocking=device.type == "cuda", copy=True)


def fill(buffer: Tensor, tensor: Tensor) -> None:
    """Copy a tensor of any shape from host memory into a buffer of the same shape on the device."""
    buffer.copy_(tensor, non_blocking=buffer.is_cuda)


def flat_views(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views into a uint8 buffer (flat_size(tensors),), one with the dtype and shape of each tensor, of any shape."""
    views, start = [], 0
    for tensor in tensors:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views


def flat_size(tensors: list[Tensor]) -> int:
    """Bytes that `flat_views` needs for the tensors, each at an aligned address."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _pin(buffer: Tensor) -> None:
    # torch's own pinned memory is allocated in powers of two: a block of 650 MB would take 1 GB.
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False


class Lane:
    """Copies that run beside the computation: in a CUDA stream of their own on CUDA, else in program order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_computation(self) -> Iterator[None]:
        """Inside, run copies in the copy stream, after everything that is queued in the compute stream now."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """An event that is reached when the copies queued so far are done; None without CUDA."""
        return self.stream.record_event() if self.stream is not None else None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the compute stream wait for an event of `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor of any shape until the copies queued so far are done."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """Keep the memory of a tensor of any shape, copied in this lane, until the compute stream is done with it."""
        if self.stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor


@cache
def lane(device: torch.device) -> Lane:
    """The lane of a device; there is one per device."""
    return Lane(device)
