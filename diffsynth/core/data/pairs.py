"""Pairs: rows with a second image, which was judged worse than the first."""

import filecmp
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .order.buckets import Size
from .sources.storage import size_on_disk

REJECTED = "rejected_image"  # the column of the second image


def fault_of_pair(
    row: Mapping[str, Any], keys: Sequence[str], fitted: Mapping[str, Sequence[Size | None]], folder: str
) -> str | None:
    """Why the two images of a row cannot be compared, as far as their files tell; None if they can, or it has one.

    Args:
        keys: Columns of images; the first holds the image that was judged better.
        fitted: By column, the sizes (width, height) in pixels that its images will have; empty if buckets decide.
        folder: Folder that file names are relative to.
    """
    chosen = keys[0]
    if REJECTED not in keys or not {chosen, REJECTED} <= row.keys():
        return None
    if fault := _fault_of_sizes(chosen, *(fitted.get(key, ()) for key in (chosen, REJECTED))):
        return fault
    if not _are_one_file(folder, row[chosen], row[REJECTED]):
        return None
    return f"{REJECTED} {row[REJECTED]!r:.300} is the same picture as {chosen}; name two pictures, or leave the row out"


def _fault_of_sizes(chosen: str, own: Sequence[Size | None], other: Sequence[Size | None]) -> str | None:
    if None in (*own, *other) or list(own) == list(other):
        return None
    of_chosen, of_rejected = (", ".join(f"{width} x {height}" for width, height in each) for each in (own, other))
    return (
        f"{chosen} is trained at {of_chosen} pixels and {REJECTED} at {of_rejected}; set dataset.height=… "
        "dataset.width=…, or dataset.buckets=true, which crop both to one size"
    )


def _are_one_file(folder: str, own: Any, other: Any) -> bool:
    """Whether two cells name files of equal bytes on this machine."""
    if isinstance(own, list) and isinstance(other, list):
        return len(own) == len(other) and all(map(_are_one_file, [folder] * len(own), own, other))
    if own == other:
        return True
    if not isinstance(own, str) or not isinstance(other, str):
        return False
    files = [os.path.join(folder, name) for name in (own, other)]
    return None not in map(size_on_disk, files) and filecmp.cmp(*files, shallow=False)
