"""How many bytes tensors hold at any moment, whether they are real or fake."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is entered, until nobody holds them any more.

    What an operation allocates and frees inside itself is not seen. Under `FakeTensorMode`, to be entered first,
    nothing is allocated at all and the numbers are the same.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        self.watch([made] if isinstance(made, Tensor) else [t for t in tree_leaves(made) if isinstance(t, Tensor)])
        return made

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors too, as those that were there before."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _watch(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def forget(_) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.now += size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in [tensor.untyped_storage() for tensor in tensors]}.values())
