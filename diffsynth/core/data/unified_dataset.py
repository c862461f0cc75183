"""A data set of a folder of files and a metadata table; `scan` reports unusable rows before training starts."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import ImageOps

from ..input_files import InputFile
from ..ranges import NonNegativeInt, Pixels, Repeat, Side, Workers, at_least
from .conditions.base import Condition, add_conditions, ordered
from .dataset import Row, TrainingData
from .operators.augmentation import Augmentation, AugmentationChoice
from .operators.base import unread
from .operators.images import ImageCropAndResize
from .operators.loaders import default_image_operator, default_video_operator, image_loader, mask_loaders
from .operators.masks import is_mask
from .operators.unread import Unread, Variants
from .order.addresses import SampleAddress, sample_seed
from .order.buckets import AspectBuckets, Size, shown
from .order.mixing import WeightedRows
from .order.row_index import AllBut, SortedRows
from .scan import SkippedRow, check_rows, fault_of_masks, known_size, write_skipped
from .sources.files_read import captions_of, files_of_rows, folders_of, table, tables_in
from .sources.find_rows import find_rows
from .sources.storage import is_remote, size_on_disk

logger = logging.getLogger(__name__)

MOST_SIZES = 64  # files of a cell whose sizes the fingerprint has, evenly spread: a list of frames may be long; a guess


class UnifiedDataset(TrainingData):
    """The rows of a metadata table, with the files that they name loaded.

    Args:
        base_path: Folder, or URL of one, that file names in the metadata are relative to; None takes the folder of the
            metadata.
        metadata_path: A table that `read_metadata` reads, or a function from a folder to its `Rows`, such as
            `read_shards`. None looks for `metadata.csv`, `.json`, `.jsonl` or `.parquet` in `base_path`, then calls
            `read_captions`.
        repeat: How often an epoch shows each sample.
        data_file_keys: Columns that `main_data_operator` is applied to; also one comma-separated string.
        main_data_operator: Loads the files of these columns; None takes `default_image_operator(base_path)`.
        special_operator_map: Operators by column; the columns need not be among `data_file_keys`.
        on_error: "raise" raises an error that names unusable rows, "skip" skips them.
        max_data_items: Upper limit of the length.
        encoding: Text encoding of metadata and captions.
        scan_rows: `scan` checks this number of rows, the first ones.
        fit: Resizes and crops images of `data_file_keys`, or lists of them, after their operator has loaded them.
        buckets: Chooses the size or sizes at which each row is trained, from the size of the image in the first of
            `data_file_keys`; needs `scan`. None leaves the size to `fit`.
        augmentation: Random choices about each sample.
        conditions: Columns that are made of the image in the first of `data_file_keys`, after `fit` and `augmentation`;
            one may read others.

    Raises:
        ValueError: There is no metadata, it has no rows, or a condition reads a column that is no image.
    """

    column = "image"  # of files that lie in a folder without a table
    bucketed_by = "dataset.buckets"  # why rows are sorted by size, for messages
    image_loader = staticmethod(image_loader)
    default_image_operator = staticmethod(default_image_operator)
    default_video_operator = staticmethod(default_video_operator)

    def __init__(
        self,
        base_path: str | None = None,
        metadata_path: str | Callable | None = None,
        repeat: int = 1,
        data_file_keys: str | Sequence[str] = "image",
        main_data_operator: Callable | None = None,
        special_operator_map: dict[str, Callable] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_data_items: int | None = None,
        encoding: str = "utf-8",
        scan_rows: int = 1_000_000,
        fit: ImageCropAndResize | None = None,
        buckets: AspectBuckets | None = None,
        augmentation: Augmentation | None = None,
        conditions: Mapping[str, Condition] | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'{on_error=}, expected "raise" or "skip"')
        self.metadata_path, self.rows = find_rows(base_path, metadata_path, encoding, self.column)
        self.has_own_reader = callable(metadata_path)
        self.base_path = os.path.dirname(self.metadata_path) if base_path is None else str(base_path)
        if not self.rows:
            raise ValueError(f"metadata {self.metadata_path}: has no rows; add some, or set dataset.metadata")
        self.repeat, self.max_data_items, self.on_error = repeat, max_data_items, on_error
        self.scanned = range(min(len(self.rows), scan_rows))
        keys = data_file_keys.split(",") if isinstance(data_file_keys, str) else data_file_keys
        self.data_file_keys = [key.strip() for key in keys]
        main = main_data_operator or self.default_image_operator(self.base_path)
        self.operators = dict.fromkeys(self.data_file_keys, main) | dict(special_operator_map or {})
        self.loader_in: Callable[[str], Callable] | None = None  # the loader in a mode, where it may be replaced
        self.fit, self.buckets, self.augmentation = fit, buckets, augmentation or Augmentation()
        if buckets and not fit:
            raise ValueError("buckets choose sizes, and without fit images are not resized to them; pass fit as well")
        self.conditions = ordered(conditions or {})
        self._check_conditions()
        self.usable = AllBut(len(self.rows), [])
        self.sorted: SortedRows | None = None
        self.skipped_by_scan: list[SkippedRow] = []
        # In shared memory, so that the reporting process sees the flags that DataLoader workers set.
        self.undecodable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    @classmethod
    def from_folder(
        cls,
        path: str,
        metadata: str | Callable | None = None,
        height: Side | None = None,
        width: Side | None = None,
        max_pixels: Pixels | Sequence[Pixels] = 1024 * 1024,
        buckets: bool = False,
        max_aspect: Annotated[float, at_least(1)] = 2.0,
        division_factor: Side = 16,
        upscale: bool = False,
        data_file_keys: Sequence[str] = ("image",),
        repeat: Repeat = 1,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: Workers | None = None,
        encoding: str = "utf-8",
        scan_rows: NonNegativeInt = 1_000_000,
        augmentation: Augmentation | None = None,
        allow_urls: bool = False,
        conditions: Mapping[str, Condition] | None = None,
    ) -> "UnifiedDataset":
        """Make a data set of a folder of images.

        Args:
            path: The folder, or its URL.
            metadata: Name of a file in the folder, another path, or a function from a folder to its `Rows`.
            height, width: Fixed size in pixels of all images; None keeps each image's shape.
            max_pixels: Most pixels of an image; with `buckets` also several budgets.
            buckets: Crop images to the sizes of `AspectBuckets`.
            max_aspect, division_factor, upscale: See `AspectBuckets`.
            num_workers: See `TrainingData`.
            allow_urls: Fetch the files that rows name by http(s) URLs, each time that they are read.

        All other arguments are those of the class.

        Raises:
            ValueError: Two arguments exclude each other.
        """
        if buckets and (height, width) != (None, None):
            raise ValueError(
                "dataset.buckets=true chooses sizes, and dataset.height and dataset.width fix one; set "
                "dataset.buckets=false, or dataset.height=null dataset.width=null."
            )
        if not buckets and not isinstance(max_pixels, int):
            raise ValueError(
                f"dataset.max_pixels={max_pixels} lists several sizes, which need buckets; set dataset.buckets=true or "
                "one number."
            )
        sizes = AspectBuckets(max_pixels, division_factor, max_aspect, upscale) if buckets else None
        largest = max_pixels if isinstance(max_pixels, int) else max(max_pixels)
        fit = ImageCropAndResize(height, width, largest, division_factor, division_factor)
        options = {"on_error": on_error, "encoding": encoding, "scan_rows": scan_rows}
        options |= {"fit": fit, "buckets": sizes, "augmentation": augmentation, "conditions": conditions}
        image, masks = cls.image_loader(path, allow_urls), mask_loaders(data_file_keys, path, allow_urls)
        dataset = cls(path, metadata, repeat, data_file_keys, image, masks, **options)
        dataset.num_workers, dataset.loader_in = num_workers, partial(cls.image_loader, path, allow_urls)
        return dataset

    def keep_images_as_they_are(self) -> None:
        """Raise an error for images that would be resized, cropped or mirrored.

        For images that a model sampled: resized, an image would no longer belong to the noise of its seed.

        Raises:
            ValueError: The augmentation mirrors or crops images.
        """
        flip, random_crop = self.augmentation.flip, self.augmentation.random_crop
        if flip or random_crop:
            raise ValueError(
                f"dataset.augmentation.flip={flip} and random_crop={random_crop} change images, which then no longer "
                "belong to the noise of their seeds; set flip=0 and random_crop=false."
            )
        if self.fit:
            self.fit.only_as_it_is = True

    def read_images_in(self, mode: str) -> None:
        if self.loader_in:
            images = [key for key in self.data_file_keys if not is_mask(key)]
            self.operators |= dict.fromkeys(images, self.loader_in(mode))

    def read_images_of(self, column: str) -> None:
        if column not in self.data_file_keys:
            self.operators.setdefault(column, self.operators[self.data_file_keys[0]])
            self.data_file_keys.append(column)

    def read_column(self, name: str, reader: Callable[[str], Callable]) -> None:
        self.operators.setdefault(name, reader(self.base_path))

    def __len__(self) -> int:
        return self._at_most(self.size * self.repeat)

    @property
    def size(self) -> int:
        """Number of samples: usable rows, one sample for each size of a row, and at most `max_data_items`.

        Raises:
            ValueError: There are buckets, and `scan` has not sorted the rows into them.
        """
        if self.buckets and self.sorted is None:
            raise ValueError(f"the rows of {self.metadata_path} are not sorted into buckets yet; call scan() first")
        return self._at_most(len(self.usable if self.sorted is None else self.sorted))

    def _at_most(self, length: int) -> int:
        return length if self.max_data_items is None else min(length, self.max_data_items)

    def __getitem__(self, index: int) -> dict:
        """Sample `index` modulo the number of samples, with its files loaded and without augmentation.

        Raises:
            ValueError: A file cannot be decoded. With on_error="skip" the next row that can be decoded replaces it, and
                the error is raised only if there is none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)}")
        return self._first_that_loads(index % self.size, lambda row: AugmentationChoice())[0]

    def sample(self, address: SampleAddress, seed: int, number: int | None = None) -> tuple[dict, str | None]:
        """The sample at an address of a run, randomly augmented, and the name of its augmentation variant.

        Args:
            number: Number of the sample in this data set, if it differs from the address's index (in a mixed data set).
        """

        choose = partial(self._choice, address, seed)
        return self._first_that_loads(address.index if number is None else number, choose)

    def variant_at(self, address: SampleAddress, seed: int, number: int | None = None) -> str | None:
        """The name that `sample` returns; None for a row that could not be decoded, which another replaces."""
        row_number = self._row_number(address.index if number is None else number)
        return None if self.undecodable[row_number] else self._choice(address, seed, self.rows[row_number]).variant

    def _choice(self, address: SampleAddress, seed: int, row: dict) -> AugmentationChoice:
        weights = [weight for _, weight in self.augmentation.texts(row)]
        choice = self.augmentation.choose(weights, seed, address)
        return replace(choice, conditions=sample_seed(seed, "conditions", *address)) if self._changing else choice

    @property
    def _changing(self) -> list[str]:
        """Names of the conditions that are others each time that a sample is shown."""
        return [name for name, condition in self.conditions.items() if condition.is_random]

    def original_size(self, number: int) -> Size | None:
        """(width, height) of a sample's first image before it is resized; None if it is not on this machine."""
        row, key = self.rows[self._row_number(number)], self.data_file_keys[0]
        return known_size(self.operators[key], row[key]) if key in row else None

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        numbers = {self._fixed_size(): range(self.size)} if self.sorted is None else self.sorted.by_size(self.size)
        return {size: [WeightedRows(rows, Fraction(len(self), self.size))] for size, rows in numbers.items()}

    def _fixed_size(self) -> Size | None:
        """The one size (width, height) of all images; None if there is none."""
        return (self.fit.width, self.fit.height) if self.fit and self.fit.height else None

    def skips(self, number: int) -> bool:
        """Whether a sample is skipped, instead of an error, if it cannot be read."""
        return self.on_error == "skip"

    def check_variants(self) -> None:
        self.augmentation.choices([1.0])
        if self._changing:
            key = f"dataset.conditions.{self._changing[0]}"
            raise ValueError(
                f"{key} is random, another one each time, which cannot be cached; set {key}.fixed=true to give each "
                "image always the same."
            )

    def variants(self, number: int) -> Variants:
        """All augmentation variants of sample `number`, with files not read yet.

        Raises:
            TypeError: A file's operator can't describe what it makes.
            ValueError: The variants can't be listed.
        """
        self.check_variants()
        row, size = self.rows[self._row_number(number)], self._size_of(number)
        weights = [weight for _, weight in self.augmentation.texts(row)]
        choices = self.augmentation.choices(weights)
        rows = {choice.variant: self._chosen(row, size, choice, unread) for choice in choices}
        images = [value for value in flat(rows[""].get(self.data_file_keys[0])) if isinstance(value, Unread)]
        return Variants(images[0].size if images else (0, 0), weights, rows)

    def _first_that_loads(self, number: int, choose: Callable[[dict], AugmentationChoice]) -> tuple[dict, str | None]:
        """Sample `number` and its variant; with on_error="skip" the next one of its size if it cannot be decoded."""
        size = self._size_of(number)
        others = range(number, number + self.size) if self.on_error == "skip" else [number]
        for other in (n % self.size for n in others if self._size_of(n % self.size) == size):
            row = self.rows[self._row_number(other)]
            try:
                choice = choose(row)
                return self._chosen(row, size, choice, called), choice.variant
            except ValueError as error:
                self._note_undecodable(self._row_number(other), error)
        candidates = f"samples of {shown(size)}" if size else f"{len(self.usable)} rows"
        raise ValueError(f"none of the {candidates} of {self.metadata_path} can be loaded; correct them")

    def _row_number(self, number: int) -> int:
        return self.usable[number] if self.sorted is None else int(self.sorted.rows[number])

    def _size_of(self, number: int) -> Size | None:
        """The bucket (width, height) of a sample; None without buckets."""
        return None if self.sorted is None else self.sorted.size_of(number)

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        """Check the first `scan_rows` rows, reading only headers of files, and return the rows that are skipped.

        A row needs a caption and the `required` columns, and each file in its `data_file_keys` must open. URLs are not
        fetched, except for the image sizes that buckets need.

        Raises:
            ValueError: Rows cannot be used and on_error="raise", or none is left; buckets need the size of rows beyond
                `scan_rows`; or no row has a caption column.
        """
        self._check_captions()
        unchecked = len(self.rows) - len(self.scanned)
        if unchecked and self.buckets:
            raise ValueError(f"{self.bucketed_by} need the size of every row; set dataset.scan_rows={len(self.rows)}.")
        faults, sizes = check_rows(self, required)
        if faults and (self.on_error == "raise" or len(faults) == len(self.scanned)):
            raise ValueError(self._describe(faults))
        if unchecked:
            counts = unchecked, len(self.rows), self.metadata_path, len(self.scanned)
            logger.info("%d of %d rows of %s were not checked; dataset.scan_rows=%d sets how many are.", *counts)
        self.usable = AllBut(len(self.rows), [fault.row - 1 for fault in faults])
        self.skipped_by_scan = faults
        if self.buckets:
            self.sorted = SortedRows.of(self.buckets, sizes)
        elif not self._fixed_size():
            self.own_sizes = {size for _, size in sizes}
        return faults

    def fault_of_sizes(self, stored: Mapping[str, Size | None]) -> str | None:
        """Why the stored sizes of a row's columns, as far as they are known, do not fit together; None if they do."""
        return fault_of_masks(self.data_file_keys, stored)

    def _check_conditions(self) -> None:
        for name, condition in self.conditions.items():
            if name == self.data_file_keys[0]:
                raise ValueError(f"dataset.conditions.{name} would replace the images to train on; name another column")
            if absent := [column for column in condition.columns if column not in {*self.operators, *self.conditions}]:
                keys = ",".join([*self.data_file_keys, absent[0]])
                raise ValueError(
                    f"dataset.conditions.{name} reads the column {absent[0]!r}, which holds no images; set "
                    f"dataset.data_file_keys=[{keys}] if rows name its files, or let another condition make it"
                )

    def _check_captions(self) -> None:
        others = [column for column in self.augmentation.captions if column != "prompt"]
        unknown = [column for column in others if not any(column in self.rows[number] for number in self.scanned)]
        if unknown:
            raise ValueError(
                f"dataset.augmentation.captions names {unknown[0]!r}, which no row of {self.metadata_path} has; choose "
                f"from {', '.join(self.rows[0])}."
            )

    def fingerprint(self) -> str:
        """A hash (16 hex digits) of all rows, the numbers of the used rows, and the file sizes that `scan` read."""
        digest = blake2b(self.rows.digest().encode() + self.usable.before.tobytes(), digest_size=8)
        for number in self.scanned:
            row = self.rows[number]
            sizes = [self._bytes_of(row[key]) for key in self.data_file_keys if key in row]
            digest.update(repr(sizes).encode())
        return digest.hexdigest()

    def input_files(self) -> dict[str, InputFile]:
        images = files_of_rows(self.rows, list(self.operators), self.base_path)
        if os.path.isfile(self.metadata_path):
            return {os.path.basename(self.metadata_path): table(self.metadata_path), **images}
        if is_remote(self.metadata_path):
            return images
        listed = tables_in(self.base_path) if self.has_own_reader else captions_of(images)
        return {**listed, **images, **folders_of(images)}

    def _bytes_of(self, cell: Any) -> list[int | None]:
        """Sizes in bytes of the files that a cell names, or of some of many."""
        cells = cell if isinstance(cell, list) else [cell]
        names = [name for name in cells[:: max(1, len(cells) // MOST_SIZES)] if isinstance(name, str)]
        return [size_on_disk(os.path.join(self.base_path, name)) for name in names]

    @property
    def skipped(self) -> list[SkippedRow]:
        """The rows that `scan` skipped, then the rows that could not be decoded during training."""
        numbers = self.undecodable.nonzero().flatten().tolist()
        return self.skipped_by_scan + [SkippedRow(n + 1, self._files(n), "could not be decoded") for n in numbers]

    def write_skipped(self, path: str | Path) -> None:
        """Write `skipped` as JSON lines, atomically, and log how many rows there are."""
        write_skipped(path, self.skipped, len(self.rows), self.metadata_path)

    def _chosen(self, row: dict, size: Size | None, choice: AugmentationChoice, apply: Callable) -> dict:
        """An augmented row.

        Args:
            apply: `called` to apply operators to cells, `unread` to describe what they would return.
        """
        cells, row = row, Row(row)
        if any(column in row for column in self.augmentation.captions):
            row["prompt"] = self.augmentation.prompt(row, choice)
        for key in [key for key in self.operators if key in row]:
            with errors_named(key, row[key]):
                row[key] = self._cell(cells, key, size, choice, apply)
        add_conditions(row, self.data_file_keys[0], self.conditions, choice.conditions)
        return row

    def _cell(self, row: dict, key: str, size: Size | None, choice: AugmentationChoice, apply: Callable) -> Any:
        """The value of a row's cell; the arguments are those of `_chosen`."""
        value = apply(self.operators[key], row[key])
        return self._fitted(value, size, choice) if key in self.data_file_keys else value

    def _fitted(self, value: Any, size: Size | None, choice: AugmentationChoice) -> Any:
        """An image, or every image of a list, resized, cropped and mirrored for training."""
        if isinstance(value, list):
            return [self._fitted(element, size, choice) for element in value]
        if isinstance(value, Unread):
            value = self.fit.unread(value, size) if self.fit else value
            return value.then(ImageOps.mirror, "mirrored") if choice.mirrored else value
        value = self.fit(value, size, choice.position) if self.fit else value
        return ImageOps.mirror(value) if choice.mirrored else value

    def _note_undecodable(self, number: int, error: ValueError) -> None:
        """Mark a row as not decodable, or raise with on_error="raise"."""
        message = f"row {number + 1}: {error}"
        if self.on_error == "raise":
            message += "; correct it, or skip such rows with dataset.on_error=skip"
            raise ValueError(message) from error.__cause__
        if not self.undecodable[number]:
            logger.warning("The next row replaces %s", message)
        self.undecodable[number] = True

    def _files(self, number: int) -> str:
        row = self.rows[number]
        return ", ".join(str(row[key]) for key in self.data_file_keys if key in row)

    def _describe(self, faults: list[SkippedRow]) -> str:
        first = "\n  ".join(f"{str(fault).rstrip('.')}." for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more." if len(faults) > 5 else ""
        or_skip = ", or skip them with dataset.on_error=skip" if len(faults) < len(self.scanned) else ""
        return (
            f"{len(faults)} of {len(self.scanned)} rows of {self.metadata_path} cannot be used:\n  {first}{more}\n"
            f"Correct them{or_skip}."
        )


@contextmanager
def errors_named(key: str, cell: Any) -> Iterator[None]:
    """Raise the errors of loading a cell as ValueError, or as TypeError, with the names of column and file."""
    try:
        yield
    # Pillow's decoders raise OSError, SyntaxError, struct.error, DecompressionBombError and others.
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{key} {cell!r:.300}: {error!s:.999}") from error


def called(operator: Callable, value: Any) -> Any:
    """The result of an operator; the counterpart of `unread`."""
    return operator(value)


def flat(value: Any) -> list:
    """The elements of nested lists as one list."""
    return [inner for element in value for inner in flat(element)] if isinstance(value, list) else [value]
