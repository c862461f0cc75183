"""Count the bytes that tensors, real or fake, hold at each moment and at most."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_in_host_memory: ContextVar[bool] = ContextVar("in_host_memory", default=False)


@contextmanager
def in_host_memory() -> Iterator[None]:
    """Count tensors that are made inside as host memory, also where device and host are the same memory."""
    token = _in_host_memory.set(True)
    try:
        yield
    finally:
        _in_host_memory.reset(token)


@dataclass
class Level:
    """The number of bytes held now, and the peak."""

    now: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        """Add `size` bytes, which may be negative."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> None:
        """Set the peak to the bytes held now."""
        self.peak = self.now


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create while the mode is active, until they are freed.

    Storages that are created inside `in_host_memory` count as `host`, all others as `device`. Memory that an operation
    allocates and frees within itself is not seen. Under `FakeTensorMode`, which must be entered first, nothing is
    allocated and the counts are the same.
    """

    def __init__(self):
        super().__init__()
        self.device, self.host = Level(), Level()
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        self.watch(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return result

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as well, such as those that exist already."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage())

    def restart(self) -> None:
        """Set both peaks to the bytes held now."""
        self.device.restart()
        self.host.restart()

    def _watch(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        level = self.host if _in_host_memory.get() else self.device

        def forget(_: weakref.ref) -> None:
            del self._seen[key]
            level.add(-size)

        self._seen[key] = weakref.ref(storage, forget)
        level.add(size)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]  # a list, as ids of freed objects are reused
    return sum({id(storage): storage.nbytes() for storage in storages}.values())
