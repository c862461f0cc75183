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


def own_share(items: Sequence) -> list:
    """The items that this process's group of processes works on; see `together`."""
    state, size = PartialState(), _together.get()
    return [*items[state.process_index // size :: state.num_processes // size]]


def turns(items: Sequence) -> int:
    """Number of items that the group of processes with the most of them works on; see `own_share`."""
    return -(-len(items) // (PartialState().num_processes // _together.get()))


def leads() -> bool:
    """Whether this process is the first of its group, which writes what the group has made; see `together`."""
    return PartialState().process_index % _together.get() == 0


def share(items: Sequence, make: Callable[[list], Sequence]) -> list:
    """The results of `make(items)`, one per item and in order; every group of processes makes a part of them.

    `together` sets the number of processes in a group, which is 1 by default.
    """
    if _together.get() == PartialState().num_processes:
        return list(make(list(items))) if items else []
    numbers, mine = own_share(range(len(items))), own_share(items)
    results = make(mine) if mine else []  # there may be more processes than items
    gathered = dict(gather_object(list(zip(numbers, results, strict=True))))
    return [gathered[number] for number in range(len(items))]
