"""How many bytes tensors hold at any moment, whether they are real or fake."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_in_host_memory: ContextVar[bool] = ContextVar("in_host_memory", default=False)


@contextmanager
def in_host_memory() -> Iterator[None]:
    """What is made inside waits for the device in host memory, also where device and host are one."""
    token = _in_host_memory.set(True)
    try:
        yield
    finally:
        _in_host_memory.reset(token)


@dataclass
class Level:
    """Bytes held now, and at most so far."""

    now: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is entered, until nobody holds them any more.

    What waits in host memory (`in_host_memory`) is counted apart from the rest, which is the device's.

    What an operation allocates and frees inside itself is not seen. Under `FakeTensorMode`, to be entered first,
    nothing is allocated at all and the numbers are the same.
    """

    def __init__(self):
        super().__init__()
        self.device, self.host = Level(), Level()
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        self.watch([made] if isinstance(made, Tensor) else [t for t in tree_leaves(made) if isinstance(t, Tensor)])
        return made

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors too, as those that were there before."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage())

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.device.restart()
        self.host.restart()

    def _watch(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        level = self.host if _in_host_memory.get() else self.device

        def forget(_) -> None:
            del self._seen[key]
            level.add(-size)

        self._seen[key] = weakref.ref(storage, forget)
        level.add(size)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in [tensor.untyped_storage() for tensor in tensors]}.values())
