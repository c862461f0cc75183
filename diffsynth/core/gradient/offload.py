"""Activations that wait for the backward pass in host memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..memory import host


@contextmanager
def offloaded(model: Callable) -> Iterator[None]:
    """What is saved inside for the backward pass waits in host memory, but for the weights of a module `model`."""
    activations = _Activations(model)
    with saved_tensors_hooks(activations.put_away, activations.bring_back):
        yield


class _Activations:
    """What one module saved. When the first of it is wanted all of it comes back, and what was saved before follows."""

    latest: "weakref.ref | None" = None

    def __init__(self, model: Callable):
        weights = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.in_host_memory: list[Tensor] = []
        self.on_device: dict[int, Tensor] = {}
        self.device, self.arrival, self.is_fetched = None, None, False
        self.before, _Activations.latest = _Activations.latest, weakref.ref(self)

    def put_away(self, tensor: Tensor) -> Tensor | int:
        # The checkpoint of torch before 2.13 saves an empty tensor of its own.
        if tensor.numel() == 0 or tensor.untyped_storage()._cdata in self.weights:
            return tensor
        self.device = tensor.device
        lane = host.lane(tensor.device)
        with lane.after_computation():
            self.in_host_memory.append(host.to_host(tensor))
        lane.keep(tensor)
        return len(self.in_host_memory) - 1

    def bring_back(self, saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        lane, before = host.lane(self.device), self.before and self.before()
        lane.wait(self.arrival)
        if before is not None:
            before.fetch()
        if saved not in self.on_device:  # wanted again, as in a second backward pass through the same graph
            return host.to_device(self.in_host_memory[saved], self.device)
        return lane.hand_over(self.on_device.pop(saved))

    def fetch(self) -> None:
        if self.is_fetched or self.device is None:
            return
        lane = host.lane(self.device)
        with lane.after_computation():
            self.on_device = {n: host.to_device(t, self.device) for n, t in enumerate(self.in_host_memory)}
        self.arrival, self.is_fetched = lane.mark(), True
