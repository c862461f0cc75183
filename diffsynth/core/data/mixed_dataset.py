"""Train on several data sets together, each with a weight."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path

import torch

from ..input_files import InputFile
from ..ranges import PositiveFloat, Workers
from .dataset import REGULARISATION, TrainingData
from .operators.unread import Variants
from .order.addresses import SampleAddress
from .order.buckets import Size
from .order.mixing import WeightedRows, exact
from .scan import SkippedRow, write_skipped
from .unified_dataset import UnifiedDataset


class MixedDataset(TrainingData):
    """The concatenation of several data sets; samples of one size share batches, whichever data set they are from.

    Each data set keeps its own options: its augmentation, its size or buckets, and its handling of bad rows.

    Args:
        datasets: The data sets by name.
        weights: How often an epoch shows each sample of a data set, by name; 1 by default. 2.5 shows each sample 2 or 3
            times, 0.1 shows a different tenth of the samples in each epoch. A data set's own `repeat` multiplies this.
        regularisation: Names of the data sets whose samples are there to keep what the model knows. If there are any,
            every row says in its column `REGULARISATION` whether it is of one of them.
        num_workers: See `TrainingData`.

    Raises:
        ValueError: There is no data set, one cannot be mixed, a weight is not positive, a name is unknown, or all data
            sets are for regularisation.
    """

    def __init__(
        self,
        datasets: Mapping[str, UnifiedDataset],
        weights: Mapping[str, PositiveFloat] | None = None,
        num_workers: Workers | None = None,
        regularisation: Sequence[str] = (),
    ):
        self.regularisation = tuple(regularisation)
        self._datasets, self.num_workers = dict(datasets), num_workers
        self.weights = dict.fromkeys(datasets, 1) | dict(weights or {})
        self._check()
        # The data sets' flags are views of one shared tensor, so that a change in a data set is also seen here.
        lengths = [len(dataset.undecodable) for dataset in self.datasets.values()]
        self.undecodable = torch.zeros(sum(lengths), dtype=torch.bool).share_memory_()
        for dataset, flags in zip(self.datasets.values(), self.undecodable.split(lengths), strict=True):
            dataset.undecodable = flags

    @property
    def datasets(self) -> dict[str, UnifiedDataset]:
        return self._datasets

    @property
    def metadata_path(self) -> str:
        return ", ".join(dataset.metadata_path for dataset in self.datasets.values())

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(dataset.size for dataset in self.datasets.values())

    def __len__(self) -> int:
        """Number of samples that an epoch shows, rounded."""
        return round(sum(part.rate for parts in self.rows_in_buckets().values() for part in parts))

    @property
    def default_workers(self) -> int:
        return max(dataset.default_workers for dataset in self.datasets.values())

    @property
    def has_regularisation(self) -> bool:
        return bool(self.regularisation)

    @property
    def own_sizes(self) -> set[Size]:
        return set().union(*(dataset.own_sizes for dataset in self.datasets.values()))

    def __getitem__(self, index: int) -> dict:
        """Sample `index` with its files loaded and without augmentation."""
        with self._dataset_of(index) as (dataset, number):
            return self._marked(dataset[number], dataset)

    def sample(self, address: SampleAddress, seed: int) -> tuple[dict, str | None]:
        """The sample at an address of a run, randomly augmented, and the name of its augmentation variant."""
        with self._dataset_of(address.index) as (dataset, number):
            row, variant = dataset.sample(address, seed, number)
            return self._marked(row, dataset), variant

    def variant_at(self, address: SampleAddress, seed: int) -> str | None:
        """See `UnifiedDataset.variant_at`."""
        with self._dataset_of(address.index) as (dataset, number):
            return dataset.variant_at(address, seed, number)

    def preview(self, number: int) -> dict:
        """See `TrainingData.preview`."""
        with self._dataset_of(number) as (dataset, own_number):
            return dataset.preview(own_number)

    def original_size(self, number: int) -> Size | None:
        """See `UnifiedDataset.original_size`."""
        with self._dataset_of(number) as (dataset, own_number):
            return dataset.original_size(own_number)

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        """The samples of each size from each data set; the key None is for samples with sizes of their own."""
        buckets, start = defaultdict(list), 0
        for name, dataset in self.datasets.items():
            for size, part in dataset.rows_by_size().items():
                buckets[size].append(part.moved(start, self.weights[name]))
            start += dataset.size
        return {size: buckets[size] for size in sorted(buckets, key=lambda size: size or (0, 0))}

    def cached_weights(self) -> dict[str, Fraction]:
        """How often an epoch of the cache shows each sample of each data set, by the data set's name."""
        return {name: exact(self.weights[name]) * dataset.repeat for name, dataset in self.datasets.items()}

    def skips(self, number: int) -> bool:
        """Whether a sample is skipped, instead of an error, if it cannot be read."""
        with self._dataset_of(number) as (dataset, own_number):
            return dataset.skips(own_number)

    def variants(self, number: int) -> Variants:
        """All augmentation variants of sample `number`; see `UnifiedDataset.variants`."""
        with self._dataset_of(number) as (dataset, own_number):
            found = dataset.variants(own_number)
            for row in found.rows.values():
                self._marked(row, dataset)
            return found

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        """See `UnifiedDataset.scan`."""
        for name, dataset in self.datasets.items():
            with _named(name):
                dataset.scan(required)
        return self.skipped

    def fingerprint(self) -> str:
        """A hash (16 hex digits) of the data sets' fingerprints, names and order, and of `regularisation`."""
        fingerprints = [(name, dataset.fingerprint()) for name, dataset in self.datasets.items()]
        return blake2b(repr([*fingerprints, *self.regularisation]).encode(), digest_size=8).hexdigest()

    def input_files(self) -> dict[str, InputFile]:
        """The files of the data sets, each under its data set's name."""
        files = ((name, dataset.input_files()) for name, dataset in self.datasets.items())
        return {f"{name}: {file}": each for name, own in files for file, each in own.items()}

    @property
    def skipped(self) -> list[SkippedRow]:
        """The rows that the data sets skip."""
        rows = [(name, row) for name, dataset in self.datasets.items() for row in dataset.skipped]
        return [replace(row, reason=f"{name}: {row.reason}") for name, row in rows]

    def write_skipped(self, path: str | Path) -> None:
        """Write `skipped` as JSON lines and log how many rows there are."""
        write_skipped(path, self.skipped, len(self.undecodable), self.metadata_path)

    def _marked(self, row: dict, dataset: UnifiedDataset) -> dict:
        """A row of a data set, which says whether it is for regularisation if any data set is."""
        if self.has_regularisation:
            row[REGULARISATION] = any(dataset is self.datasets[name] for name in self.regularisation)
        return row

    @contextmanager
    def _dataset_of(self, number: int) -> Iterator[tuple[UnifiedDataset, int]]:
        """Yield the data set of a sample and the sample's number in it; errors inside name the data set."""
        own_number = number
        for name, dataset in self.datasets.items():
            if 0 <= own_number < dataset.size:
                with _named(name):
                    yield dataset, own_number
                return
            own_number -= dataset.size
        raise IndexError(f"index {number} of {self.size} samples")

    def _check(self) -> None:
        if not self.datasets:
            raise ValueError(
                "dataset.datasets is empty; name the data sets to mix, such as "
                "+dataset@dataset.datasets.photos=image_folder dataset.datasets.photos.path=my_photos"
            )
        for name, dataset in self.datasets.items():
            if not isinstance(dataset, UnifiedDataset):
                kind = type(dataset).__name__
                raise ValueError(f"dataset.datasets.{name} is a {kind}; expected a data set such as image_folder")
        if unknown := sorted(self.weights.keys() - self.datasets.keys()):
            raise ValueError(f"dataset.weights names {unknown[0]!r}; expected one of {', '.join(self.datasets)}")
        if unknown := sorted({*self.regularisation} - self.datasets.keys()):
            raise ValueError(f"dataset.regularisation names {unknown[0]!r}; expected one of {', '.join(self.datasets)}")
        if self.datasets.keys() <= {*self.regularisation}:
            raise ValueError(
                f"dataset.regularisation names {', '.join(self.datasets)}, which is every data set; take out those "
                "that teach something new"
            )
        if unshown := [name for name, weight in self.weights.items() if weight <= 0]:
            raise ValueError(
                f"dataset.weights.{unshown[0]} is {self.weights[unshown[0]]}; set it above 0, or remove {unshown[0]} "
                "from dataset.datasets"
            )


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"dataset.datasets.{name}: {error}") from error
