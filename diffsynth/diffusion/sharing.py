"""Work that processes share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter

from accelerate import PartialState
from accelerate.utils import gather_object

_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def together() -> Iterator[None]:
    """Inside, every process does all of the work: networks are called that no process has the whole of."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def share(items: Sequence, make: Callable[[list], Sequence]) -> list:
    """What `make` makes of a list, one result an item, in order; every process works on a part of it."""
    if _together.get():
        return list(make(list(items))) if items else []
    state = PartialState()
    numbers = range(state.process_index, len(items), state.num_processes)
    mine = [items[number] for number in numbers]
    made = make(mine) if mine else []  # there may be more processes than items
    shared = gather_object(list(zip(numbers, made, strict=True)))
    return [result for _, result in sorted(shared, key=itemgetter(0))]
