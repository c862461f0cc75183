"""Copies between device and host memory: all offloading and streaming goes through these functions.

On CUDA, host memory is pinned and copies run in a CUDA stream of their own. On other devices host and device are the
same memory; the copies are made all the same, so that the code can be tested there.
"""

import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .live_bytes import in_host_memory

MOST_LEAVING = 1 << 30  # bytes; a guess: the saved tensors of one or two blocks of a large model
ALIGNMENT = 256  # bytes; CUDA's own allocations have it (CUDA C++ Programming Guide, "Device Memory Accesses")


def empty(size: int, device: torch.device) -> Tensor:
    """An empty uint8 buffer of `size` bytes (size,) in host memory, pinned if `device` is a GPU."""
    with in_host_memory():
        if device.type == "cuda":
            return _pinned(size)
        return torch.empty(size, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor of any shape in host memory; from CUDA an asynchronous one, in the current stream."""
    device = "meta" if tensor.device.type == "meta" else "cpu"
    with in_host_memory():
        copy = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=tensor.is_cuda)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor of any shape in host memory; to CUDA an asynchronous one."""
    return tensor.to(device, non_blocking=device.type == "cuda", copy=True)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of any shape on `device`; if it goes from the CPU to CUDA, nothing waits for it on the way."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


def _pinned(size: int) -> Tensor:
    # torch's own pinned memory is allocated in powers of two: a block of 650 MB would take 1 GB.
    buffer = own_pages(size)
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return buffer


def own_pages(size: int) -> Tensor:
    """An empty uint8 buffer (size,) that shares its memory pages with nothing: CUDA registers a page only once."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


class Lane:
    """Copies that run beside the computation: in a CUDA stream of their own on CUDA, else in program order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # tensors whose copies may not be done

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

    def finish(self) -> None:
        """Let the CPU wait until the copies queued so far are done."""
        if (mark := self.mark()) is not None:
            mark.synchronize()

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor of any shape until the copies queued so far are done.

        If more than `MOST_LEAVING` bytes wait to leave the device, this waits for the oldest: the CPU queues work far
        ahead of the GPU, so that otherwise no memory would be free before the allocator has none left.
        """
        if (mark := self.mark()) is None:
            return
        self.leaving.append((mark, tensor))
        self._let_go(MOST_LEAVING)

    def let_go(self) -> None:
        """Wait until all copies of kept tensors are done, and keep none any longer."""
        self._let_go(0)

    def _let_go(self, most: int) -> None:
        while sum(waiting.nbytes for _, waiting in self.leaving) > most:
            oldest, _ = self.leaving.popleft()
            oldest.synchronize()


@cache
def lane(device: torch.device) -> Lane:
    """The lane of a device; there is one per device."""
    return Lane(device)
