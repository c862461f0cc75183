"""A folder of files and a metadata table, as a dataset that says what is wrong with it before training starts."""

import logging
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import ImageOps

from .dataset import Row, TrainingData
from .operators.augmentation import Augmentation, AugmentationChoice
from .operators.base import RouteByExtensionName, RouteByType, SequentialProcess, ToAbsolutePath, ToList, unread
from .operators.images import ImageCropAndResize, LoadImage
from .operators.unread import Unread, Variants
from .operators.video import LoadGIF, LoadVideo
from .order.addresses import SampleAddress
from .order.buckets import AspectBuckets, Size
from .order.mixing import WeightedRows
from .scan import AllBut, SkippedRow, SortedRows, check_rows, known_size, write_skipped
from .sources.captions import read_captions
from .sources.metadata import READERS, read_metadata
from .sources.storage import EmbeddedFile, is_file, size_on_disk
from .sources.table import Rows

logger = logging.getLogger(__name__)


class UnifiedDataset(TrainingData):
    """The rows of a metadata table, `repeat` times over, with the files they name loaded.

    Args:
        base_path: Folder, or URL of one, that the file names in the metadata are relative to; the metadata's own by
            default.
        metadata_path: Table of `read_metadata`, or what reads the `Rows` of a folder, such as `read_shards`; by default
            `metadata.csv`, `.json`, `.jsonl` or `.parquet` in `base_path`, else `read_captions`.
        repeat: Passes over the rows that make one epoch.
        data_file_keys: Columns, also as one comma-separated string, that `main_data_operator` is applied to.
        main_data_operator: `default_image_operator(base_path)` by default.
        special_operator_map: Operators of single columns; they need not be among `data_file_keys`.
        on_error: "raise" names the rows that cannot be used, "skip" leaves them out.
        max_data_items: Upper limit of the length.
        encoding: Of metadata and captions that are text.
        scan_rows: How many rows, the first ones, are looked at before training.
        fit: Brings images of `data_file_keys`, or lists of them, to the size they are trained at, after their operator.
        buckets: Which size each row is trained at, one or several; `scan` sorts the rows, by the first of
            `data_file_keys`. Without it `fit` decides, and all rows stand in one bucket.
        augmentation: What is left to chance.

    Raises:
        ValueError: No metadata is found or it has no rows.
    """

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
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'{on_error=}, expected "raise" or "skip"')
        self.metadata_path, self.rows = find_rows(base_path, metadata_path, encoding)
        self.base_path = os.path.dirname(self.metadata_path) if base_path is None else str(base_path)
        if not self.rows:
            raise ValueError(f"metadata {self.metadata_path}: has no rows")
        self.repeat, self.max_data_items, self.on_error = repeat, max_data_items, on_error
        self.scanned = range(min(len(self.rows), scan_rows))
        keys = data_file_keys.split(",") if isinstance(data_file_keys, str) else data_file_keys
        self.data_file_keys = [key.strip() for key in keys]
        main = main_data_operator or self.default_image_operator(self.base_path)
        self.operators = dict.fromkeys(self.data_file_keys, main) | dict(special_operator_map or {})
        self.fit, self.buckets, self.augmentation = fit, buckets, augmentation or Augmentation()
        if buckets and not fit:
            raise ValueError("buckets say at which size images are trained, fit brings them to it; give both")
        self.usable = AllBut(len(self.rows), [])
        self.sorted: SortedRows | None = None
        self.faults: list[SkippedRow] = []
        # Shared memory, so that what a DataLoader worker finds is known to the process that reports it.
        self.undecodable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    @classmethod
    def from_folder(
        cls,
        path: str,
        metadata: str | Callable | None = None,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | Sequence[int] = 1024 * 1024,
        buckets: bool = False,
        max_aspect: float = 2.0,
        division_factor: int = 16,
        upscale: bool = False,
        data_file_keys: Sequence[str] = ("image",),
        repeat: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
        encoding: str = "utf-8",
        scan_rows: int = 1_000_000,
        augmentation: Augmentation | None = None,
    ) -> "UnifiedDataset":
        """Dataset of a folder of images; `metadata` is a file in it, a path of its own, or what reads its rows.

        `buckets`, `max_aspect`, `division_factor`, `upscale` are those of `AspectBuckets`; `num_workers` is how many
        processes should load it.
        """
        if buckets and (height, width) != (None, None):
            raise ValueError("dataset.height, dataset.width and dataset.buckets all say how large images are; use one.")
        if not buckets and not isinstance(max_pixels, int):
            raise ValueError(f"dataset.max_pixels={max_pixels} are several sizes, which need dataset.buckets=true.")
        sizes = AspectBuckets(max_pixels, division_factor, max_aspect, upscale) if buckets else None
        largest = max_pixels if isinstance(max_pixels, int) else max(max_pixels)
        fit = ImageCropAndResize(height, width, largest, division_factor, division_factor)
        options = {"on_error": on_error, "encoding": encoding, "scan_rows": scan_rows}
        options |= {"fit": fit, "buckets": sizes, "augmentation": augmentation}
        dataset = cls(path, metadata, repeat, data_file_keys, cls.image_loader(path), **options)
        dataset.num_workers = num_workers
        return dataset

    @staticmethod
    def image_loader(base_path: str = "") -> RouteByType:
        """Operator that loads an image, or every image of a list, as it is."""
        image = ToAbsolutePath(base_path) >> LoadImage()
        return RouteByType([(str, image), (list, SequentialProcess(image)), (EmbeddedFile, image)])

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
        return RouteByType([(str, image), (list, SequentialProcess(image)), (EmbeddedFile, image)])

    @staticmethod
    def default_video_operator(
        base_path: str = "",
        max_pixels: int = 1024 * 1024,
        height: int | None = None,
        width: int | None = None,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        num_frames: int = 81,
        time_division_factor: int = 4,
        time_division_remainder: int = 1,
        frame_rate: float | None = None,
    ) -> RouteByType:
        """Operator that loads the frames of a video or animation as a list, a still image as a list of one.

        Raises:
            ImportError: PyAV is not installed.
        """
        crop = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
        length = (num_frames, time_division_factor, time_division_remainder, crop, frame_rate)
        extensions = [
            (("jpg", "jpeg"), LoadImage() >> crop >> ToList()),
            (("gif", "webp", "png", "apng", "avif"), LoadGIF(*length)),
            (("mp4", "m4v", "mov", "mkv", "webm", "avi", "wmv", "flv", "mpg", "mpeg", "ts"), LoadVideo(*length)),
        ]
        video = ToAbsolutePath(base_path) >> RouteByExtensionName(extensions)
        return RouteByType([(str, video), (EmbeddedFile, video)])

    def keep_images_as_they_are(self) -> None:
        """Refuse, image by image, what would be resized or cropped: each belongs to the noise it was drawn from.

        Raises:
            ValueError: Chance would mirror or crop them.
        """
        chance = self.augmentation
        if chance.flip or chance.random_crop:
            raise ValueError(
                f"dataset.augmentation.flip={chance.flip} and random_crop={chance.random_crop} make other pictures "
                "than their seeds draw; leave both out."
            )
        if self.fit:
            self.fit.only_as_it_is = True

    def read_column(self, name: str, reader: Callable[[str], Callable]) -> None:
        self.operators.setdefault(name, reader(self.base_path))

    def __len__(self) -> int:
        return self._at_most(self.size * self.repeat)

    @property
    def size(self) -> int:
        """How many samples there are: usable rows, each as often as it has sizes, or `max_data_items`.

        Raises:
            ValueError: There are buckets, and no row was looked at.
        """
        if self.buckets and self.sorted is None:
            raise ValueError(f"the rows of {self.metadata_path} are in no buckets yet; scan() sorts them")
        return self._at_most(len(self.usable if self.sorted is None else self.sorted))

    def _at_most(self, length: int) -> int:
        return length if self.max_data_items is None else min(length, self.max_data_items)

    def __getitem__(self, index: int) -> dict:
        """Sample `index` modulo their number, its files loaded, nothing left to chance.

        Raises:
            ValueError: A file cannot be decoded. With on_error="skip" the next row that can takes its place, and
                the error is raised only if there is none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)}")
        return self._first_that_loads(index % self.size, lambda row: AugmentationChoice())[0]

    def sample(self, address: SampleAddress, seed: int, number: int | None = None) -> tuple[dict, str | None]:
        """The sample at an address of a run, as chance makes it there, and the name of that variant.

        Args:
            number: Which sample it is, where that is not the address's index.
        """

        def choose(row: dict) -> AugmentationChoice:
            weights = [weight for _, weight in self.augmentation.texts(row)]
            return self.augmentation.choose(weights, seed, address)

        return self._first_that_loads(address.index if number is None else number, choose)

    def original_size(self, number: int) -> Size | None:
        """(width, height) of a sample's first image before it is fitted; None of one that is not on this machine."""
        row, key = self.rows[self._row_number(number)], self.data_file_keys[0]
        return known_size(self.operators[key], row[key]) if key in row else None

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        numbers = {self._fixed_size(): range(self.size)} if self.sorted is None else self.sorted.by_size(self.size)
        return {size: [WeightedRows(own, Fraction(len(self), self.size))] for size, own in numbers.items()}

    def _fixed_size(self) -> Size | None:
        return (self.fit.width, self.fit.height) if self.fit and self.fit.height else None

    def skips(self, number: int) -> bool:
        """Whether a sample is left out if it cannot be read."""
        return self.on_error == "skip"

    def variants(self, number: int) -> Variants:
        """All that sample `number` may be, its files unread.

        Raises:
            TypeError: A file's operator cannot tell what it makes.
            ValueError: There is no end of variants.
        """
        row, size = self.rows[self._row_number(number)], self._size_of(number)
        weights = [weight for _, weight in self.augmentation.texts(row)]
        rows = {c.variant: self._chosen(row, size, c, unread) for c in self.augmentation.choices(weights)}
        images = [value for value in flat(rows[""].get(self.data_file_keys[0])) if isinstance(value, Unread)]
        return Variants(images[0].size if images else (0, 0), weights, rows)

    def _first_that_loads(self, number: int, choose: Callable[[dict], AugmentationChoice]) -> tuple[dict, str | None]:
        """Sample `number` or, with on_error="skip", the next one of its size that can be decoded."""
        size = self._size_of(number)
        others = range(number, number + self.size) if self.on_error == "skip" else [number]
        for other in (n % self.size for n in others if self._size_of(n % self.size) == size):
            row = self.rows[self._row_number(other)]
            try:
                choice = choose(row)
                return self._chosen(row, size, choice, called), choice.variant
            except ValueError as error:
                self._note_undecodable(self._row_number(other), error)
        those = f"samples of {size[0]} x {size[1]} pixels" if size else f"{len(self.usable)} rows"
        raise ValueError(f"none of the {those} of {self.metadata_path} can be loaded; correct them")

    def _row_number(self, number: int) -> int:
        return self.usable[number] if self.sorted is None else int(self.sorted.rows[number])

    def _size_of(self, number: int) -> Size | None:
        """The size of a sample; None where `fit` decides."""
        return None if self.sorted is None else self.sorted.size_of(number)

    def scan(self, required: Sequence[str] = (), prompt_key: str = "prompt") -> list[SkippedRow]:
        """Checks `scan_rows` rows, reading no more than the headers of their files, and returns those of no use.

        A row needs a caption, the `required` columns, and a file that opens for each of its `data_file_keys`; other
        columns that a row lacks altogether are not missed. URLs are not fetched, unless for their size.

        Args:
            prompt_key: Where the caption is; `prompt` means the columns of `augmentation`.

        Raises:
            ValueError: Rows cannot be used and on_error="raise", or none is left; buckets need the size of rows that
                are not looked at; or no row has a column that captions should be from.
        """
        self._check_captions()
        unseen = len(self.rows) - len(self.scanned)
        if unseen and self.buckets:
            raise ValueError(f"dataset.buckets need the size of every row; set dataset.scan_rows={len(self.rows)}.")
        faults, seen = check_rows(self, prompt_key, required)
        if faults and (self.on_error == "raise" or len(faults) == len(self.scanned)):
            raise ValueError(self._describe(faults))
        if unseen:
            about = unseen, len(self.rows), self.metadata_path, len(self.scanned)
            logger.info("%d of %d rows of %s were not looked at; dataset.scan_rows=%d is how many are.", *about)
        self.usable = AllBut(len(self.rows), [fault.row - 1 for fault in faults])
        self.faults, self.sorted = faults, self.buckets and SortedRows.of(self.buckets, seen)
        return faults

    def _check_captions(self) -> None:
        others = [column for column in self.augmentation.captions if column != "prompt"]
        unknown = [c for c in others if not any(c in self.rows[number] for number in self.scanned)]
        if unknown:
            raise ValueError(
                f"dataset.augmentation.captions names {unknown[0]!r}, which no row of {self.metadata_path} has; choose "
                f"from {', '.join(self.rows[0])}."
            )

    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, with which are used, and with the sizes of files `scan` looks at."""
        digest = blake2b(self.rows.digest().encode() + self.usable.before.tobytes(), digest_size=8)
        for number in self.scanned:
            row = self.rows[number]
            sizes = [self._sizes(row[key]) for key in self.data_file_keys if key in row]
            digest.update(repr(sizes).encode())
        return digest.hexdigest()

    def _sizes(self, files: Any) -> list[int | None]:
        names = [file for file in (files if isinstance(files, list) else [files]) if isinstance(file, str)]
        return [size_on_disk(os.path.join(self.base_path, name)) for name in names]

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows left out by `scan`, then those that could not be decoded when their turn came."""
        numbers = self.undecodable.nonzero().flatten().tolist()
        return self.faults + [SkippedRow(n + 1, self._files(n), "could not be decoded") for n in numbers]

    def write_skipped(self, path: str | Path) -> None:
        """Writes `skipped` as JSON lines and says how many there are; the file appears whole or not at all."""
        write_skipped(path, self.skipped, len(self.rows), self.metadata_path)

    def _chosen(self, row: dict, size: Size | None, choice: AugmentationChoice, apply: Callable) -> dict:
        """A row as it is chosen; `apply(operator, value)` calls operators, or asks them what they would return."""
        row = Row(row)
        if any(column in row for column in self.augmentation.captions):
            row["prompt"] = self.augmentation.prompt(row, choice)
        for key in [key for key in self.operators if key in row]:
            try:
                value = apply(self.operators[key], row[key])
                row[key] = self._fitted(value, size, choice) if key in self.data_file_keys else value
            # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, DecompressionBombError.
            except Exception as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{key} {row[key]!r}: {error}") from error
        return row

    def _fitted(self, value: Any, size: Size | None, choice: AugmentationChoice) -> Any:
        """An image at the size and in the part that it is trained at, or every image of a list."""
        if isinstance(value, list):
            return [self._fitted(element, size, choice) for element in value]
        if isinstance(value, Unread):
            value = self.fit.unread(value, size) if self.fit else value
            return value.then(ImageOps.mirror, "mirrored") if choice.mirrored else value
        value = self.fit(value, size, choice.position) if self.fit else value
        return ImageOps.mirror(value) if choice.mirrored else value

    def _note_undecodable(self, number: int, error: ValueError) -> None:
        message = f"row {number + 1}: {error}"
        if self.on_error == "raise":
            message += "; correct it, or leave such rows out with dataset.on_error=skip"
            raise ValueError(message) from error.__cause__
        if not self.undecodable[number]:
            logger.warning("The next row takes the place of %s", message)
        self.undecodable[number] = True

    def _files(self, number: int) -> str:
        row = self.rows[number]
        return ", ".join(str(row[key]) for key in self.data_file_keys if key in row)

    def _describe(self, faults: list[SkippedRow]) -> str:
        first = "\n  ".join(map(str, faults[:5]))
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        or_skip = ", or leave them out with dataset.on_error=skip" if len(faults) < len(self.scanned) else ""
        return (
            f"{len(faults)} of {len(self.scanned)} rows of {self.metadata_path} cannot be used:\n  {first}{more}\n"
            f"Correct them{or_skip}."
        )


def find_rows(base_path: str | None, metadata: str | Callable | None, encoding: str) -> tuple[str, Rows]:
    """Where rows are from, and the rows: `metadata` in `base_path` or by itself, a default name's, or captions."""
    if callable(metadata):
        return str(base_path), metadata(str(base_path))
    if base_path is None and metadata is None:
        raise ValueError("base_path and metadata_path are both None; give at least one")
    if base_path is None:
        return str(metadata), read_metadata(metadata, encoding)
    names = [f"metadata{suffix}" for suffix in READERS] if metadata is None else [metadata]
    candidates = [os.path.join(base_path, name) for name in names] + [str(metadata)] * (metadata is not None)
    for candidate in filter(is_file, candidates):
        return candidate, read_metadata(candidate, encoding)
    if metadata is None and (rows := read_captions(str(base_path), encoding)):
        return str(base_path), rows
    looked_for = ", ".join(dict.fromkeys(candidates)) + ", images" * (metadata is None)
    raise ValueError(f"no metadata: looked for {looked_for}; set dataset.path or dataset.metadata")


def called(operator: Callable, value: Any) -> Any:
    return operator(value)


def flat(value: Any) -> list:
    return [inner for element in value for inner in flat(element)] if isinstance(value, list) else [value]
