"""What a run asks of any data set, and what a row of one is."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .operators.unread import Variants
from .order.addresses import SampleAddress
from .order.buckets import Size
from .order.mixing import MixedOrder, WeightedRows, first_samples, joined
from .scan import SkippedRow


class Row(dict):
    """The cells of a row by column, its files loaded; of a cached row also what frozen units made of it.

    Args:
        made: Inputs of the pipeline, by side (`shared`, `posi`, `nega`) and name; empty unless the row is cached, in
            which case its images are not there, but have a size.
    """

    def __init__(self, cells: Mapping[str, Any] = (), made: Mapping[str, Mapping[str, Any]] | None = None):
        super().__init__(cells)
        self.made = dict(made or {})


class TrainingData(Dataset):
    """A data set that a run can train on or evaluate on.

    A subclass has a `size` and `__getitem__`, and overrides what is not as it is here: all samples have sizes of their
    own, are shown once a pass, have one variant, and none is left out.

    Args:
        metadata_path: Where its rows are from, for messages.
        repeat: Passes over the samples that make one epoch.
        num_workers: Processes that should load it.
    """

    size: int
    metadata_path: str = ""
    repeat: int = 1
    num_workers: int = 0
    needs_encoders = True  # whether the run has to encode its rows, as no cache holds what encoders make

    @property
    def undecodable(self) -> Tensor:
        """Which rows could not be decoded, one flag a row (N,), bool."""
        return self.__dict__.setdefault("_undecodable", torch.zeros(0, dtype=torch.bool))

    @undecodable.setter
    def undecodable(self, flags: Tensor) -> None:
        self.__dict__["_undecodable"] = flags

    @property
    def datasets(self) -> Mapping[str, "TrainingData"]:
        """The data sets that it is mixed from, by name."""
        return {"": self}

    def __len__(self) -> int:
        return self.size * self.repeat

    # Before training

    def keep_images_as_they_are(self) -> None:
        """Refuse to resize, crop or mirror images, because each belongs to the noise it was sampled from."""

    def read_column(self, name: str, reader: Callable[[str], Callable]) -> None:
        """Read the column `name` by `reader(base_path)`, unless an operator for it is given already."""

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        """Check the rows, reading no more than headers of files, and return those that are left out.

        Raises:
            ValueError: Rows cannot be used, or lack one of the `required` columns.
        """
        return []

    def fingerprint(self) -> str:
        """Hex digits that change with the samples."""
        return ""

    def check_made_for(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache that other networks or other code made than those `expected` (`cache.keys.CacheKeys.about`).

        Raises:
            ValueError: Names every difference.
        """

    # While training

    def sample(self, address: SampleAddress, seed: int) -> tuple[Any, str | None]:
        """The sample at an address of a run, as chance makes it there, and the name of its augmentation variant.

        The name is None if the variants can't be listed (random crop, shuffled tags).
        """
        return self[address.index], ""

    def rows_by_size(self) -> dict[Size | None, WeightedRows]:
        """The samples of each size (width, height) in pixels; None where each has its own."""
        return {size: joined(rows) for size, rows in self.rows_in_buckets().items()}

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        """What each size has from each data set that is mixed; None where each sample has its own size."""
        return {None: [WeightedRows(range(self.size), self.repeat)]}

    def order(self, batch_size: int, seed: int, samples: int | None = None) -> MixedOrder:
        """An order of batches of one size each, of the first `samples` only; None takes all."""
        buckets = list(self.rows_in_buckets().values())
        return MixedOrder(buckets if samples is None else first_samples(buckets, samples), batch_size, seed)

    # Making a cache

    def passes(self) -> dict[str, Fraction | int]:
        """How often a pass shows each sample of each data set, by name."""
        return dict.fromkeys(self.datasets, 1)

    def variants(self, number: int) -> Variants:
        """All that sample `number` may be, its files unread.

        Raises:
            TypeError: It can't be known without loading them.
        """
        raise TypeError(
            f"{type(self).__name__} cannot tell what its samples are without loading them; it has no cache."
        )

    def skips(self, number: int) -> bool:
        """Whether sample `number` is left out if it cannot be read."""
        return False

    # What is reported

    def original_size(self, number: int) -> Size | None:
        """(width, height) of a sample's first image before it is fitted; None where that is not known."""
        return None

    @property
    def skipped(self) -> list[SkippedRow]:
        """The rows that are left out."""
        return []

    def write_skipped(self, path: str | Path) -> None:
        """Write `skipped` as JSON lines and say how many there are."""


class PlainData(TrainingData):
    """Any map-style data set, with nothing left to chance: what `launch_training_task` takes from a script.

    Args:
        dataset: Has a length and gives a sample for an index.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.size = dataset, len(dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]
