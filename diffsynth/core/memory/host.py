"""Host memory: all that waits there for the device is put there, and brought back, by these functions.

On CUDA host memory is pinned and copies run in a stream of their own. Elsewhere host and device are one, and copies are
made all the same.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .live import in_host_memory


def empty(size: int, device: torch.device) -> Tensor:
    """A flat buffer of `size` bytes in host memory, for what is used on `device`."""
    with in_host_memory():
        buffer = torch.empty(size, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
    if device.type == "cuda":
        _pin(buffer)
    return buffer


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from CUDA made when the current stream gets there."""
    device = "meta" if tensor.device.type == "meta" else "cpu"
    with in_host_memory():
        copy = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=tensor.is_cuda)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of what is in host memory."""
    return tensor.to(device, non_blocking=device.type == "cuda", copy=True)


def fill(buffer: Tensor, tensor: Tensor) -> None:
    """Overwrite a buffer on the device with what is in host memory."""
    buffer.copy_(tensor, non_blocking=buffer.is_cuda)


def flat_views(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of a buffer of `flat_size(tensors)` bytes, a part for each tensor, in its dtype and shape."""
    views, start = [], 0
    for tensor in tensors:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views


def flat_size(tensors: list[Tensor]) -> int:
    """Bytes that tensors take one after the other, each at an address that kernels like."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(size: int, alignment: int = 256) -> int:
    return math.ceil(size / alignment) * alignment


def _pin(buffer: Tensor) -> None:
    # torch's own pinned memory comes in powers of two: a block of 650 MB would take 1 GB.
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False


class Lane:
    """Where copies run beside the computation: on CUDA a stream, elsewhere nowhere in particular."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_computation(self) -> Iterator[None]:
        """Copies inside wait for what the computation has been asked for so far, and for nothing later."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self):
        """The moment when the copies so far are done."""
        return self.stream.record_event() if self.stream is not None else None

    def wait(self, mark) -> None:
        """Let the computation wait for that moment."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def keep(self, tensor: Tensor) -> None:
        """Do not reuse the memory of the computation's tensor before the copies so far are done."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """A tensor that was made here, as one of the computation's."""
        if self.stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor


@cache
def lane(device: torch.device) -> Lane:
    """The one lane of a device."""
    return Lane(device)
