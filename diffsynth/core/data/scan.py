"""Check the rows of a data set before training: find rows that cannot be used, and the sizes of images."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from ..json_text import to_json
from ..masking import masked_values
from .operators.base import check, unread
from .operators.masks import is_mask, of_other_sizes
from .order.buckets import Size
from .pairs import fault_of_pair
from .sources.table import is_empty

if TYPE_CHECKING:
    from .operators.augmentation import Augmentation
    from .operators.images import ImageCropAndResize
    from .unified_dataset import UnifiedDataset

logger = logging.getLogger(__name__)

SCAN_THREADS = 16  # opening a file is mostly waiting for the disk; a guess


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used.

    Args:
        row: Number of the row in the metadata, counted from 1.
        file: The file at fault, if there is one.
        reason: Why the row cannot be used.
    """

    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


def check_rows(dataset: "UnifiedDataset", required: Sequence[str]) -> tuple[list[SkippedRow], list[tuple[int, Size]]]:
    """The unusable rows, and (row number, image size) of the others.

    A size (width, height) in pixels is the stored one with buckets, else the one that `dataset.fit` makes of it. Rows
    of unknown size are left out.
    """
    strides = [dataset.scanned[start::SCAN_THREADS] for start in range(SCAN_THREADS)]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = pool.map(_check_some, repeat(dataset), strides, repeat(required))
        results = list(chain.from_iterable(found))
    faults = sorted((fault for fault in results if isinstance(fault, SkippedRow)), key=lambda fault: fault.row)
    return faults, sorted(size for size in results if not isinstance(size, SkippedRow))


def _check_some(dataset: "UnifiedDataset", numbers: Sequence[int], required: Sequence[str]) -> list:
    results = (_check_row(dataset, number, required) for number in numbers)
    return [result for result in results if result is not None]


def _check_row(dataset: "UnifiedDataset", number: int, required: Sequence[str]) -> SkippedRow | tuple[int, Size] | None:
    """The fault of a row, or its number and size (see `check_rows`), or None."""
    row, size, stored, fitted = dataset.rows[number], None, {}, {}
    if fault := _fault_of_cells(dataset, row, required):
        return SkippedRow(number + 1, None, fault)
    for key in [key for key in dataset.operators if key in row]:
        try:
            known = check(dataset.operators[key], row[key])
            stored[key] = _first(known)
            if dataset.buckets and key == dataset.data_file_keys[0]:
                size = _first(known) or _first(unread(dataset.operators[key], row[key])).size
                for target in dataset.buckets.assign(*size).values():
                    dataset.fit.check(size, target)
            elif dataset.fit and key in dataset.data_file_keys and not dataset.buckets:
                fitted[key] = _target_sizes(dataset.fit, known)
                size = fitted[key][0] if key == dataset.data_file_keys[0] else size
        except Exception as error:  # Pillow's decoders raise exceptions of many types
            return SkippedRow(number + 1, str(row[key]), f"{key} {row[key]!r:.300}: {error!s:.999}")
    if fault := dataset.fault_of_sizes(stored) or fault_of_pair(row, dataset.data_file_keys, fitted, dataset.base_path):
        return SkippedRow(number + 1, None, fault)
    return size and (number, size)


def _fault_of_cells(dataset: "UnifiedDataset", row: dict, required: Sequence[str]) -> str | None:
    """Why a row's cells cannot be used, its files not considered; None if they can."""
    if twice := [name for name in dataset.conditions if name in row]:
        return f"has a column {twice[0]}, which dataset.conditions.{twice[0]} would replace; leave one of them out"
    read = [column for condition in dataset.conditions.values() for column in condition.columns]
    image = dataset.data_file_keys[:1] if dataset.buckets or dataset.conditions else ()
    needed = dict.fromkeys([*required, *image, *read, "prompt"])
    given = {*row, *dataset.conditions}
    given |= {"prompt"} if any(column in row for column in dataset.augmentation.captions) else set()
    if absent := [key for key in needed if key not in given]:
        other_column = "; 'dataset.augmentation.captions={NAME: 1}' takes another column"
        is_unnamed = absent == ["prompt"] and list(dataset.augmentation.captions) == absent
        columns = ", ".join(name if name == name.strip() else repr(name) for name in row)
        return f"has no {absent[0]}, but {columns:.300}{other_column if is_unnamed else ''}"
    if empty := [key for key in dataset.data_file_keys if key in row and is_empty(row[key])]:
        return f"{empty[0]} is empty"
    return _fault_of_captions(dataset.augmentation, row)


def fault_of_masks(keys: Sequence[str], stored: Mapping[str, Size | None]) -> str | None:
    """Why a mask does not lie on its image, judged by the stored sizes of columns; None if it does, or one is unknown.

    Masks are the columns whose names end in "mask".
    """
    image, masks = stored.get(keys[0]), [key for key in keys if is_mask(key)]
    wrong = [key for key in masks if image and stored.get(key) and stored[key][:2] != image[:2]]
    if not wrong:
        return None
    return of_other_sizes(wrong[0], stored[wrong[0]][:2], keys[0], image[:2])


def _fault_of_captions(augmentation: "Augmentation", row: dict) -> str | None:
    """Why a row has no caption to choose; None if it has one."""
    try:
        texts = [text for text, _ in augmentation.texts(row)]
    except ValueError as error:
        return str(error)
    columns = [column for column, weight in augmentation.captions.items() if weight > 0]
    return None if any(texts) else " and ".join(f"{column} is empty" for column in columns)


def _target_sizes(fit: "ImageCropAndResize", known: Size | list[Size] | None) -> list[Size | None]:
    """The sizes to which `fit` brings images of the known sizes; it raises if it cannot."""
    return [size and fit.check(size) for size in (known if isinstance(known, list) else [known])]


def known_size(operator: Callable, cell: Any) -> Size | None:
    """(width, height) of the image in a cell, or of the first of several; None if its header is not at hand."""
    return _first(check(operator, cell))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def write_skipped(path: str | Path, skipped: Sequence[SkippedRow], count: int, source: str) -> None:
    """Write the rows that are skipped as JSON lines, and log how many of the `count` rows of `source` they are."""
    write_text(path, "".join(to_json(masked_values(asdict(row)), ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        logger.warning("%d of %d rows of %s are skipped; %s lists them.", len(skipped), count, source, path)
