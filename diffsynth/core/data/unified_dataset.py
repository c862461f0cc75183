"""A folder of files and a metadata table, as a dataset that says what is wrong with it before training starts."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

from ..files import write_text
from .metadata import READERS, read_metadata
from .operators import ImageCropAndResize, LoadImage, RouteByType, SequentialProcess, ToAbsolutePath, check

logger = logging.getLogger(__name__)

SCAN_THREADS = 16


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used: its number in the metadata, counted from 1, the file at fault if any, and why."""

    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


class UnifiedDataset(Dataset):
    """The rows of a metadata table, `repeat` times over, with the files they name loaded.

    Args:
        base_path: Folder that the file names in the metadata are relative to; the metadata's own by default.
        metadata_path: Table of `read_metadata`; by default `metadata.csv`, `.json` or `.jsonl` in `base_path`.
        repeat: Passes over the rows that make one epoch.
        data_file_keys: Columns, also as one comma-separated string, that `main_data_operator` is applied to.
        main_data_operator: `default_image_operator(base_path)` by default.
        special_operator_map: Operators of single columns; they need not be among `data_file_keys`.
        on_error: "raise" names the rows that cannot be used, "skip" leaves them out.
        max_data_items: Upper limit of the length.

    Raises:
        ValueError: No metadata is found or it has no rows.
    """

    def __init__(
        self,
        base_path: str | None = None,
        metadata_path: str | None = None,
        repeat: int = 1,
        data_file_keys: str | Sequence[str] = "image",
        main_data_operator: Callable | None = None,
        special_operator_map: dict[str, Callable] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_data_items: int | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'{on_error=}, expected "raise" or "skip"')
        self.metadata_path = find_metadata(base_path) if metadata_path is None else metadata_path
        self.base_path = str(Path(self.metadata_path).parent if base_path is None else base_path)
        self.rows = read_metadata(self.metadata_path)
        if not self.rows:
            raise ValueError(f"metadata {self.metadata_path}: has no rows")
        self.repeat, self.max_data_items, self.on_error = repeat, max_data_items, on_error
        keys = data_file_keys.split(",") if isinstance(data_file_keys, str) else data_file_keys
        self.data_file_keys = [key.strip() for key in keys]
        main = main_data_operator or self.default_image_operator(self.base_path)
        self.operators = dict.fromkeys(self.data_file_keys, main) | dict(special_operator_map or {})
        self.usable: Sequence[int] = range(len(self.rows))
        self.faults: list[SkippedRow] = []
        # Shared memory, so that what a DataLoader worker finds is known to the process that reports it.
        self.undecodable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    num_workers = 0

    @classmethod
    def from_folder(
        cls,
        path: str,
        metadata: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int = 1024 * 1024,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        data_file_keys: Sequence[str] = ("image",),
        repeat: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
    ) -> "UnifiedDataset":
        """Dataset of a folder of images; `metadata` is a file in that folder or a path of its own.

        `num_workers` is how many processes should load it; the data set only carries the wish.
        """
        operator = cls.default_image_operator(
            path, max_pixels, height, width, height_division_factor, width_division_factor
        )
        dataset = cls(path, find_metadata(path, metadata), repeat, data_file_keys, operator, on_error=on_error)
        dataset.num_workers = num_workers
        return dataset

    @staticmethod
    def default_image_operator(
        base_path: str = "",
        max_pixels: int = 1024 * 1024,
        height: int | None = None,
        width: int | None = None,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
    ) -> RouteByType:
        """Operator that loads an image, or every image of a list, at the size `ImageCropAndResize` gives it."""
        crop = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
        image = ToAbsolutePath(base_path) >> LoadImage() >> crop
        return RouteByType([(str, image), (list, SequentialProcess(image))])

    def __len__(self) -> int:
        length = len(self.usable) * self.repeat
        return length if self.max_data_items is None else min(length, self.max_data_items)

    def __getitem__(self, index: int) -> dict:
        """Row `index` modulo the number of rows, its files loaded.

        Raises:
            ValueError: A file cannot be decoded. With on_error="skip" the next row that can takes its place, and
                the error is raised only if there is none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)}")
        if self.on_error == "raise":
            return self._load(self.usable[index % len(self.usable)])
        for offset in range(len(self.usable)):
            number = self.usable[(index + offset) % len(self.usable)]
            try:
                return self._load(number)
            except ValueError as error:
                self._record_undecodable(number, error)
        raise ValueError(f"none of the {len(self.usable)} rows of {self.metadata_path} can be loaded; correct them")

    def scan(self, prompt_key: str = "prompt", required: Sequence[str] = ()) -> list[SkippedRow]:
        """Checks every row, reading no more than the headers of its files, and returns those that cannot be used.

        A row needs a prompt, the `required` columns, and a file that opens for each of its `data_file_keys`; other
        columns that a row lacks altogether are not missed. URLs are not fetched.

        Raises:
            ValueError: Rows cannot be used and on_error="raise", or none is left.
        """
        strides = [range(start, len(self.rows), SCAN_THREADS) for start in range(SCAN_THREADS)]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = chain.from_iterable(pool.map(self._find_faults, strides, repeat(prompt_key), repeat(required)))
            faults = sorted(found, key=lambda fault: fault.row)
        if faults and (self.on_error == "raise" or len(faults) == len(self.rows)):
            raise ValueError(self._describe(faults))
        unusable = {fault.row for fault in faults}
        self.usable = [number for number in range(len(self.rows)) if number + 1 not in unusable]
        self.faults = faults
        return faults

    def fingerprint(self) -> str:
        """16 hex digits that change with the rows that are used, their order and the sizes of their files."""
        digest = blake2b(digest_size=8)
        for number in self.usable:
            row = self.rows[number]
            sizes = [self._size(row[key]) for key in self.data_file_keys if key in row]
            digest.update(json.dumps([row, sizes], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _size(self, files: str | Sequence[str]) -> list[int | None]:
        paths = [Path(self.base_path, file) for file in ([files] if isinstance(files, str) else files)]
        return [path.stat().st_size if path.is_file() else None for path in paths]

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows left out by `scan`, then those that could not be decoded when their turn came."""
        numbers = self.undecodable.nonzero().flatten().tolist()
        return self.faults + [SkippedRow(n + 1, self._files(n), "could not be decoded") for n in numbers]

    def write_skipped(self, path: str | Path) -> None:
        """Writes `skipped` as JSON lines and says how many there are; the file appears whole or not at all."""
        skipped = self.skipped
        write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped))
        if skipped:
            counts = f"{len(skipped)} of {len(self.rows)} rows"
            logger.warning("%s of %s are left out; %s lists them.", counts, self.metadata_path, path)

    def _load(self, number: int) -> dict:
        row = dict(self.rows[number])
        for key in [key for key in self.operators if key in row]:
            try:
                row[key] = self.operators[key](row[key])
            # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, DecompressionBombError.
            except Exception as error:
                raise ValueError(
                    f"row {number + 1}: {key} {row[key]!r}: {error}; correct it, or leave such rows out with "
                    "dataset.on_error=skip"
                ) from error
        return row

    def _record_undecodable(self, number: int, error: ValueError) -> None:
        if not self.undecodable[number]:
            logger.warning("The next row takes the place of %s", error)
        self.undecodable[number] = True

    def _find_faults(self, numbers: range, prompt_key: str, required: Sequence[str]) -> list[SkippedRow]:
        return [fault for number in numbers if (fault := self._find_fault(number, prompt_key, required))]

    def _find_fault(self, number: int, prompt_key: str, required: Sequence[str]) -> SkippedRow | None:
        row = self.rows[number]
        absent = [key for key in required if key not in row]
        if absent:
            return SkippedRow(number + 1, None, f"has no {absent[0]}, but {', '.join(row)}")
        if is_empty(row.get(prompt_key)):
            return SkippedRow(number + 1, None, f"{prompt_key} is empty")
        for key in [key for key in self.operators if key in row]:
            if key in self.data_file_keys and is_empty(row[key]):
                return SkippedRow(number + 1, None, f"{key} is empty")
            try:
                check(self.operators[key], row[key])
            except Exception as error:  # as in _load
                return SkippedRow(number + 1, str(row[key]), f"{key} {row[key]!r}: {error}")
        return None

    def _files(self, number: int) -> str:
        row = self.rows[number]
        return ", ".join(str(row[key]) for key in self.data_file_keys if key in row)

    def _describe(self, faults: list[SkippedRow]) -> str:
        first = "\n  ".join(map(str, faults[:5]))
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        or_skip = ", or leave them out with dataset.on_error=skip" if len(faults) < len(self.rows) else ""
        return (
            f"{len(faults)} of {len(self.rows)} rows of {self.metadata_path} cannot be used:\n  {first}{more}\n"
            f"Correct them{or_skip}."
        )


def find_metadata(base_path: str | None, metadata: str | None = None) -> str:
    """First that exists of `metadata` in `base_path` and `metadata` itself, or of the default names in `base_path`."""
    if base_path is None:
        raise ValueError("base_path and metadata_path are both None; give at least one")
    names = [f"metadata{suffix}" for suffix in READERS] if metadata is None else [metadata]
    candidates = [os.path.join(base_path, name) for name in names] + [metadata] * (metadata is not None)
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    looked_for = ", ".join(dict.fromkeys(candidates))
    raise ValueError(f"no metadata: looked for {looked_for}; set dataset.path or dataset.metadata")


def is_empty(value) -> bool:
    """Whether a cell holds nothing: None, blank text, or what other programs write for it, NaN."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or value != value
