"""`note`: numbers that an objective computes beside its loss, such as the distance to the base; they are logged."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_notes: ContextVar[list[tuple[str, Tensor]] | None] = ContextVar("notes", default=None)


def note(name: str, values: Tensor) -> None:
    """Log the mean of `values` (B,) over the samples of a training step as `name`; an evaluation logs nothing."""
    notes = _notes.get()
    if notes is not None:
        notes.append((name, values.detach()))


@contextmanager
def noting() -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, what is noted becomes elements (name, values (B,)) of the list that this returns."""
    token = _notes.set(notes := [])
    try:
        yield notes
    finally:
        _notes.reset(token)
