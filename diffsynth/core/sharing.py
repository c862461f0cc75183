"""Split work on a list of items across processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate import PartialState
from accelerate.utils import gather_object

_together: ContextVar[int] = ContextVar("together", default=1)


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Inside, groups of `processes` processes run every forward pass together.

    They have to, because weights (FSDP2, ZeRO-3) or tokens (context parallelism) are split across them.
    """
    token = _together.set(processes)
    try:
        yield
    finally:
        _together.reset(token)


def runs_together() -> bool:
    """Whether this process has to call the networks as often as others do; see `together`."""
    return _together.get() > 1


def share(items: Sequence, make: Callable[[list], Sequence]) -> list:
    """The results of `make(items)`, one per item and in order; every group of processes makes a part of them.

    `together` sets the number of processes in a group, which is 1 by default.
    """
    state, size = PartialState(), _together.get()
    if size == state.num_processes:
        return list(make(list(items))) if items else []
    numbers = range(state.process_index // size, len(items), state.num_processes // size)
    mine = [items[number] for number in numbers]
    results = make(mine) if mine else []  # there may be more processes than items
    gathered = dict(gather_object(list(zip(numbers, results, strict=True))))
    return [gathered[number] for number in range(len(items))]
