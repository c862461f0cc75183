"""Work that processes share."""

from collections.abc import Callable, Sequence
from operator import itemgetter

from accelerate import PartialState
from accelerate.utils import gather_object


def share(items: Sequence, make: Callable[[list], Sequence]) -> list:
    """What `make` makes of a list, one result an item, in order; every process works on a part of it."""
    state = PartialState()
    numbers = range(state.process_index, len(items), state.num_processes)
    mine = [items[number] for number in numbers]
    made = make(mine) if mine else []  # there may be more processes than items
    shared = gather_object(list(zip(numbers, made, strict=True)))
    return [result for _, result in sorted(shared, key=itemgetter(0))]
