"""`TrainingData`, the base class of every data set, and `Row`, a sample before the pipeline's units process it."""

from collections.abc import Callable, Mapping, Sequence, Set
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..input_files import InputFile
from .operators.unread import Variants
from .order.addresses import SampleAddress
from .order.buckets import Size
from .order.mixing import MixedOrder, WeightedRows, first_samples, joined
from .scan import SkippedRow

# Of each GPU; a guess: one core decodes and shrinks a JPEG of 2048² pixels in 0.14 s (measured 2026-11-30).
DEFAULT_WORKERS = 2
REGULARISATION = "regularisation"  # column of a mixture: whether a row is there to keep what the model knows


class Row(dict):
    """The cells of a row by column, with files loaded; a cached row also has the outputs of frozen units.

    Args:
        cells: Values by column. Images of a cached row have a size, but cannot be loaded.
        made: Outputs of frozen units, which are inputs of the pipeline, by side (`shared`, `posi`, `nega`) and name;
            empty unless the row is from a cache.
    """

    def __init__(self, cells: Mapping[str, Any] = (), made: Mapping[str, Mapping[str, Any]] | None = None):
        super().__init__(cells)
        self.made = dict(made or {})


class TrainingData(Dataset):
    """Base class of the data sets that a run can train on or evaluate on.

    A subclass has a `size` and a `__getitem__`. It overrides the methods whose defaults are wrong for it. By default
    each sample has an image size of its own and one variant, and no row is skipped.

    An epoch shows each sample `repeat` times; in a mixture, the weight of the sample's data set multiplies this.

    Attributes:
        size: Number of samples.
        metadata_path: File or folder that the rows are from, for messages.
        repeat: How often an epoch shows each sample.
        num_workers: Number of DataLoader processes that should load the data set; None leaves it to `workers_on`.
        default_workers: That number on a GPU.
        column: Column that holds what the model generates, such as images.
        has_images: Whether the samples have images to learn from; a data set of prompts has empty ones.
        needs_encoders: Whether the run has to load encoders; a cache has their outputs already.
        own_sizes: Image sizes (width, height) in pixels, if they differ from sample to sample within a batch.
        has_regularisation: Whether rows say, in the column `REGULARISATION`, that they are there for regularisation.
        undecodable: Whether each row failed to decode (N,), bool; empty if the data set does not keep count.
    """

    size: int
    metadata_path: str = ""
    repeat: int = 1
    num_workers: int | None = 0
    default_workers: int = DEFAULT_WORKERS
    column = "image"
    has_images = True
    needs_encoders = True
    has_regularisation = False
    own_sizes: Set[Size] = frozenset()
    undecodable: Tensor = torch.zeros(0, dtype=torch.bool)

    @property
    def datasets(self) -> Mapping[str, "TrainingData"]:
        """The data sets that this one mixes, by name."""
        return {"": self}

    def __len__(self) -> int:
        return self.size * self.repeat

    # Before training

    def keep_images_as_they_are(self) -> None:
        """Raise an error for images that would be resized, cropped or mirrored.

        For images that a model sampled and that are trained with the noise they were sampled from.
        """

    def read_images_in(self, mode: str) -> None:
        """Read images in a mode of Pillow, such as `RGBA`; those without alpha are opaque then.

        Columns that an operator of the caller's own reads stay as they are.
        """

    def read_images_of(self, column: str) -> None:
        """Read a further column as images, which are cropped and resized like those of the first."""

    def read_column(self, name: str, reader: Callable[[str], Callable]) -> None:
        """Read the column `name` by the operator `reader(base_path)`, unless it has an operator already."""

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        """Check the rows, reading only headers of files, and return the rows that are skipped.

        Raises:
            ValueError: Rows cannot be used, or lack one of the `required` columns.
        """
        return []

    def fingerprint(self) -> str:
        """A hash (hex digits) that changes with the samples."""
        return ""

    def input_files(self) -> dict[str, InputFile]:
        """The files on this machine that samples are read from, by name: metadata and, of many images, some."""
        return {}

    def check_made_for(
        self, expected: Callable[[], Mapping[str, Any]], keys_of: Callable[..., Set[tuple[str, str]]] | None = None
    ) -> None:
        """Check that a cache was made by the networks and code of `expected()` (`cache.keys.CacheKeys.about`).

        Args:
            keys_of: Returns key and side of the entries of a row (`CacheKeys.of`); None compares no entries.

        Raises:
            ValueError: It was not; names every difference.
        """

    # While training

    def sample(self, address: SampleAddress, seed: int) -> tuple[Any, str | None]:
        """The sample at an address of a run, randomly augmented, and the name of its augmentation variant.

        The augmentation is a function of `seed` and `address`. The name is None if the variants can't be listed (random
        crop, shuffled tags).
        """
        return self[address.index], ""

    def variant_at(self, address: SampleAddress, seed: int) -> str | None:
        """The name that `sample` returns, found without loading files; None if only loading them tells."""
        return None

    def workers_on(self, device: torch.device) -> int:
        """Number of DataLoader processes for a training on `device`; by default they decode while a GPU computes."""
        if self.num_workers is None:
            return self.default_workers if device.type == "cuda" else 0
        return self.num_workers

    def rows_by_size(self) -> dict[Size | None, WeightedRows]:
        """The samples of each size (width, height) in pixels; the key None is for samples with sizes of their own."""
        return {size: joined(rows) for size, rows in self.rows_in_buckets().items()}

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        """The samples of each size from each mixed data set; the key None is for samples with sizes of their own."""
        return {None: [WeightedRows(range(self.size), self.repeat)]}

    def order(self, batch_size: int, seed: int, samples: int | None = None) -> MixedOrder:
        """An endless order of samples in which all images of a batch have one size.

        Args:
            samples: Number of samples to take from the beginning of the data set; None takes all.
        """
        buckets = list(self.rows_in_buckets().values())
        return MixedOrder(buckets if samples is None else first_samples(buckets, samples), batch_size, seed)

    # Making a cache

    def cached_weights(self) -> dict[str, Fraction | int]:
        """How often an epoch of the cache shows each sample of each mixed data set, by the data set's name.

        The cache has a `repeat` of its own, which multiplies this.
        """
        return dict.fromkeys(self.datasets, 1)

    def check_variants(self) -> None:
        """Check that the augmentation variants of samples can be listed.

        Raises:
            ValueError: They can't, because there is no end of them; names the option to set.
        """

    def variants(self, number: int) -> Variants:
        """All augmentation variants of sample `number`, with files not read yet.

        Raises:
            TypeError: The data set can't describe its samples without loading them.
        """
        raise TypeError(
            f"{type(self).__name__} can't describe its samples without loading them, as a cache needs; use "
            "dataset=image_folder, say."
        )

    def skips(self, number: int) -> bool:
        """Whether sample `number` is skipped, instead of an error, if it cannot be read."""
        return False

    # Reports

    def preview(self, number: int) -> Any:
        """Sample `number` without augmentation, of a video one frame only: what tells whether two samples are equal."""
        return self[number]

    def original_size(self, number: int) -> Size | None:
        """(width, height) in pixels of a sample's first image before it is resized; None if unknown."""
        return None

    @property
    def skipped(self) -> list[SkippedRow]:
        """The rows that are skipped."""
        return []

    def write_skipped(self, path: str | Path) -> None:
        """Write `skipped` as JSON lines and log how many rows there are."""


class PlainData(TrainingData):
    """Wraps any map-style data set, without augmentation; `launch_training_task` accepts such data sets.

    Args:
        dataset: A data set with `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.size = dataset, len(dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]
