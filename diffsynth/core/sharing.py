"""Work that processes share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate import PartialState
from accelerate.utils import gather_object

_together: ContextVar[int] = ContextVar("together", default=1)


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Inside, so many processes do the same work: networks are called of which, or of whose tokens, each has a part."""
    token = _together.set(processes)
    try:
        yield
    finally:
        _together.reset(token)


def share(items: Sequence, make: Callable[[list], Sequence]) -> list:
    """What `make` makes of a list, one result an item, in order; every process works on a part of it."""
    state, size = PartialState(), _together.get()
    if size == state.num_processes:
        return list(make(list(items))) if items else []
    numbers = range(state.process_index // size, len(items), state.num_processes // size)
    mine = [items[number] for number in numbers]
    made = make(mine) if mine else []  # there may be more processes than items
    shared = dict(gather_object(list(zip(numbers, made, strict=True))))
    return [shared[number] for number in range(len(items))]
