"""Activation offloading: tensors that autograd saves for the backward pass are kept in host memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .. import host_memory


@contextmanager
def offloaded(model: Callable) -> Iterator[None]:
    """Inside, keep tensors that autograd saves in host memory, except parameters and buffers of a module `model`."""
    activations = _Activations(model)
    with saved_tensors_hooks(activations.pack, activations.unpack):
        yield


class _Activations:
    """The tensors that autograd saved of one module.

    When the backward pass asks for the first of them, all are copied back to the device. The tensors of the module that
    ran before, which the backward pass needs next, are then copied ahead of time.
    """

    latest: "weakref.ref | None" = None

    def __init__(self, model: Callable):
        weights = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.in_host_memory: list[tuple[Tensor, torch.device]] = []  # each with the device that it comes from
        self.on_device: dict[int, Tensor] = {}
        self.device, self.arrival, self.is_fetched = None, None, False
        self.previous, _Activations.latest = _Activations.latest, weakref.ref(self)

    def pack(self, tensor: Tensor) -> Tensor | int:
        """Copy a tensor, of any shape, to host memory; return its number, or a weight itself."""
        # The checkpoint of torch before 2.13 saves an empty tensor of its own.
        if tensor.numel() == 0 or tensor.untyped_storage()._cdata in self.weights:
            return tensor
        if self.device is None or tensor.device.type != "cpu":  # modules on a GPU may save scalars of the CPU as well
            self.device = tensor.device
        lane = host_memory.lane(tensor.device)
        with lane.after_computation():
            self.in_host_memory.append((host_memory.to_host(tensor), tensor.device))
        lane.keep(tensor)
        return len(self.in_host_memory) - 1

    def unpack(self, saved: Tensor | int) -> Tensor:
        """The tensor, of any shape, that `pack` got, on its device again."""
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        lane, previous = host_memory.lane(self.device), self.previous and self.previous()
        lane.wait(self.arrival)
        if previous is not None:
            previous.fetch()
        if saved not in self.on_device:  # unpacked before: this is a second backward pass through the same graph
            return host_memory.to_device(*self.in_host_memory[saved])
        return self.on_device.pop(saved)

    def fetch(self) -> None:
        """Begin to copy all tensors back to their device."""
        if self.is_fetched or self.device is None:
            return
        lane = host_memory.lane(self.device)
        lane.let_go()
        # Allocated among the computation's tensors: memory that belongs to the lane's stream could serve nothing else.
        self.on_device = {n: torch.empty_like(t, device=device) for n, (t, device) in enumerate(self.in_host_memory)}
        with lane.after_computation():
            for number, (tensor, _) in enumerate(self.in_host_memory):
                host_memory.fill(self.on_device[number], tensor)
        self.arrival, self.is_fetched = lane.mark(), True
