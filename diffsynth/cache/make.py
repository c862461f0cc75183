"""Makes a cache: runs the frozen units once over a data set and stores their outputs on disk.

1. Requests: compute the keys of all entries that each sample needs, from the bytes of its files; no network is loaded.
2. Make: run one unit after another over all samples whose entries are missing; only its networks are in memory.
3. Index: write down which entries each sample consists of.

If the process is killed, the same command continues with the entries that are missing.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset

from ..core.data import TrainingData
from ..core.data.cache import FORMAT, KEPT_FILE, CacheIndex, CacheRequest, CacheRequests, Shard, ShardWriter
from ..core.data.cached_dataset import captions_of
from ..core.data.loading import WorkerKilled, loading
from ..core.data.operators.unread import Unread, Variants, read, unread_in
from ..core.files import remove_leftovers
from ..core.process.locks import locked
from ..core.progress import ProgressBar
from ..diffusion.flow_match import TRAINING_STEPS
from ..diffusion.training_module import PipelineTrainingModule
from .keys import CacheKeys, Sides, describe, pipeline_inputs
from .verify import check_same_data, damaged_shards, locations, mend

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass
class CacheReport:
    """The result of making a cache.

    Args:
        samples: Number of samples in the cache.
        needed: Number of entries that these samples need.
        made: Number of entries that this run made, by unit; the others existed before.
        lost: Names of shard files that were missing or damaged.
        skipped: Numbers of samples that cannot be read and were skipped, as on_error="skip" of the data set allows.
    """

    samples: int
    needed: int
    made: dict[str, int]
    lost: Sequence[str]
    skipped: Sequence[int]

    def __str__(self) -> str:
        made = ", ".join(f"{count} of {name}" for name, count in self.made.items()) or "none"
        lost = f"; {len(self.lost)} damaged or missing files were replaced" if self.lost else ""
        skipped = f"; {len(self.skipped)} samples cannot be read and are skipped" if self.skipped else ""
        return f"{self.samples} samples of {self.needed} entries, made now: {made}{lost}{skipped}"


def launch_data_process_task(
    accelerator: "Accelerator",
    dataset: TrainingData,
    module: PipelineTrainingModule,
    path: str | Path,
    batch_size: int = 8,
    num_workers: int = 0,
    shard_bytes: int = 2**28,
) -> CacheReport:
    """Make or complete the cache of a data set in the folder `path`; all processes call it.

    Args:
        accelerator: Device and precision.
        dataset: The data set; its `variants` and `skips` are read.
        module: The training module that will be trained; its models are built but not loaded.
        path: Folder of the cache.
        batch_size: Samples of equal shape per forward pass of a network.
        num_workers: Number of processes that read and decode files ahead.
        shard_bytes: Size of a shard file.

    Raises:
        ValueError: The training has no frozen unit, the pipeline lacks a model, a sample has infinitely many variants
            (random crop, shuffled tags), a file cannot be read, or the cache was made of another data set.
        WorkerKilled: A process that reads files was killed; what was made is saved.
        TypeError: An input of the pipeline is neither plain data nor a file.
        FolderInUse: Another process makes, checks or tidies this cache.
        OSError: The folder cannot be written.
    """
    folder = Path(path)
    with _locked(folder, accelerator):
        index = CacheIndex(folder, writable=accelerator.is_main_process)
        maker = CacheMaker(accelerator, dataset, module, index, batch_size, num_workers)
        return maker.make_cache(shard_bytes)


@contextmanager
def _locked(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Inside, this run's first process holds the lock of a folder; if it cannot have it, all processes raise that."""
    refused = [None]
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                stack.enter_context(locked(folder))
            except (ValueError, OSError) as error:  # broadcast, so that none waits
                refused = [error]
        (error,) = broadcast_object_list(refused)
        if error is not None:
            raise error
        yield


class CacheMaker:
    """Makes one process's share of a cache; see `launch_data_process_task`."""

    def __init__(
        self,
        accelerator: "Accelerator",
        dataset: TrainingData,
        module: PipelineTrainingModule,
        index: CacheIndex,
        batch_size: int,
        num_workers: int,
    ):
        self.accelerator, self.dataset, self.module, self.index = accelerator, dataset, module, index
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.keys, self.skipped = CacheKeys(module), []
        self.keys.check()
        self.datasets = [*dataset.datasets.values()]
        self.augmentations = [own.augmentation for own in self.datasets]
        for own in self.datasets:
            own.check_variants()

    def make_cache(self, shard_bytes: int) -> CacheReport:
        """Make or complete the cache, whose folder is locked; see `launch_data_process_task`."""
        index, is_main, lost = self.index, self.accelerator.is_main_process, []
        if is_main:
            remove_leftovers(index.folder)
            lost = index.match_shards()
        self.accelerator.wait_for_everyone()
        check_same_data(index, self.dataset, self._records())
        damaged = self.damaged_shards()
        if is_main:
            lost += mend(index, damaged.values())
        self.accelerator.wait_for_everyone()
        requests = self.gather_requests()
        made = self.make(requests, shard_bytes)
        if is_main:
            index.match_shards()
            index.put(requests.samples(), self.about(requests))
        self.accelerator.wait_for_everyone()
        report = CacheReport(len(index), len(requests), made, lost, self.skipped)
        requests.close()
        index.close()
        self.accelerator.wait_for_everyone()
        if is_main:
            remove_leftovers(index.folder)
        return report

    def about(self, requests: CacheRequests) -> dict[str, Any]:
        """Return the description of the cache for its index: units, captions, variants and data sets."""
        return {
            "format": FORMAT,
            "made_of": self.keys.about(),
            "captions": [captions_of(augmentation) for augmentation in self.augmentations],
            "variants": requests.variants(),
            "by_size": len(self.dataset.order(batch_size=1, seed=0).buckets) > 1,
            "parts": self._parts(),
            "left_out": self.skipped,  # the name in the files of existing caches
            "data_sets": locations(self.dataset),
        }

    def _parts(self) -> list[tuple[int, str]]:
        """Return, for each data set, its number of samples and how often an epoch shows each of them."""
        parts, start = [], 0
        weights = self.dataset.cached_weights()
        for dataset, weight in zip(self.datasets, weights.values(), strict=True):
            skipped = sum(start <= number < start + dataset.size for number in self.skipped)
            parts.append((dataset.size - skipped, str(weight)))
            start += dataset.size
        return parts

    # Checking what exists

    def _records(self) -> Iterator[dict]:
        """Yield the records of the samples that can be read."""
        samples = _HashedVariants(self.dataset)
        readable = (variants for _, variants in map(samples.__getitem__, range(self.dataset.size)))
        return (describe(self.module, self.keys, each)[0] for each in readable if not isinstance(each, str))

    def damaged_shards(self) -> dict[int, Shard]:
        """Return the damaged shards of the cache by number; each process reads a share of all files."""
        shards = self.index.shards
        own = {number: shard for place, (number, shard) in enumerate(shards.items()) if place % self.world == self.rank}
        return {number: shards[number] for number in sorted(gather_object([*damaged_shards(own)]))}

    # Computing keys

    def gather_requests(self) -> CacheRequests:
        """Return the entries that all samples need, gathered from all processes."""
        # Names that `remove_leftovers` deletes, whichever process wrote them.
        paths = [self.index.folder / f".partial-{rank}-requests.sqlite" for rank in range(self.world)]
        own = CacheRequests(paths[self.rank])
        numbers = range(self.rank, self.dataset.size, self.world)
        progress = self._progress(len(numbers), "sample planned")
        with self._load(_HashedVariants(self.dataset), numbers) as loaded:
            for count, (number, variants) in enumerate(loaded, 1):
                if isinstance(variants, str):
                    logger.warning("Sample %d is skipped: %s", number, variants)
                    self.skipped.append(number)
                else:
                    record, wanted = describe(self.module, self.keys, variants)
                    wanted = [CacheRequest(job, shape, number, name) for job, shape, name in wanted]
                    own.add(number, variants.size, record, wanted)
                progress.advance(count)
        progress.close()
        own.close()
        self.skipped = sorted(gather_object(self.skipped))
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            merged = CacheRequests(paths[0], new=False)
            merged.merge(paths[1:])
            merged.close()
        self.accelerator.wait_for_everyone()
        return CacheRequests(paths[0], new=False)

    # Running units

    def make(self, requests: CacheRequests, shard_bytes: int) -> dict[str, int]:
        """Make this process's share of the missing entries, and return by unit how many all processes made."""
        made = Counter()
        missing = sum(1 for _ in self._missing(requests))
        progress = self._progress(len(range(self.rank, missing, self.world)), "batch made")
        own = islice(self._missing(requests), self.rank, None, self.world)
        self.module.pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)
        self.module.pipe.eval().requires_grad_(False)
        with ShardWriter(self.index.shard_folder, shard_bytes) as writer:
            for unit, batches in groupby(own, key=lambda batch: batch[0].job.unit):
                name = "images" if unit == KEPT_FILE else type(self.keys.units[unit]).__name__
                with closing(self._make_batches(unit, batches)) as results:
                    for batch, entries in results:
                        for request, entry in zip(batch, entries, strict=True):
                            if request.job.key not in self.index:
                                writer.add(request.job.key, entry)
                                made[name] += 1
                        progress.advance(progress.done + 1)
        progress.close()
        self.accelerator.wait_for_everyone()
        return dict(sum(map(Counter, gather_object([dict(made)])), Counter()))

    def _missing(self, requests: CacheRequests) -> Iterator[list[CacheRequest]]:
        """Return the batches that have a missing entry; they stay complete, as rounding may depend on the batch."""
        batches = requests.batches(self.batch_size)
        return (batch for batch in batches if any(request.job.key not in self.index for request in batch))

    def _make_batches(
        self, unit: int, batches: Iterable[list[CacheRequest]]
    ) -> Generator[tuple[list[CacheRequest], list[dict]], None, None]:
        """Yield each batch with the entries that one unit makes of it; the unit's networks are in memory meanwhile."""
        networks = self.module.pipe.models_of(self.keys.needed_units(unit), model_fn=False)
        decoded = self._load(_Decoded(self.dataset), map(self._inputs, batches))
        try:
            with self.module.pipe.loaded(networks), decoded as loaded:
                for batch, inputs in loaded:
                    yield batch, self._make_batch(batch, inputs)
        except WorkerKilled as error:
            raise WorkerKilled(f"{error} What was made is saved, and the same command goes on.") from None

    def _make_batch(self, batch: Sequence[CacheRequest], inputs: Sequence[Sides]) -> list[dict]:
        device = self.module.pipe.device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), self.accelerator.autocast(), forked:
            torch.manual_seed(0)  # for units before the stored one, which may use random numbers
            return self.keys.make([request.job for request in batch], inputs)

    def _inputs(self, batch: list[CacheRequest]) -> tuple[list[CacheRequest], list[Sides]]:
        """Return a batch with the inputs that its unit reads, their files not yet decoded."""
        names = {name for unit in self.keys.needed_units(batch[0].job.unit) for name in unit.fetch_input_params()}
        inputs = []
        for request in batch:
            sides = pipeline_inputs(self.module, self.dataset.variants(request.number).rows[request.variant])
            wanted = names | {request.job.name}
            inputs.append({side: {n: v for n, v in given.items() if n in wanted} for side, given in sides.items()})
        return batch, inputs

    def _progress(self, steps: int, unit: str) -> ProgressBar:
        return ProgressBar(steps, visible=self.accelerator.is_main_process, unit=unit)

    def _load(self, dataset: Dataset, items: Iterable) -> AbstractContextManager[Iterator]:
        """Inside, an iterator over `dataset[item]` for all items in order; workers, if there are any, load ahead."""
        return loading(dataset, self.num_workers, sampler=items, batch_size=None, collate_fn=_unchanged)


class _HashedVariants(Dataset):
    """Returns the variants of a sample with the bytes of its files hashed.

    If the sample cannot be read and its data set skips such samples, it returns the error's message instead.
    """

    def __init__(self, dataset: TrainingData):
        self.dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, Variants | str]:
        skips = self.dataset.skips(number)
        try:
            variants = self.dataset.variants(number)
            for unread in _files(variants):
                _ = unread.identity  # computed here, in the worker; the object keeps it
                if skips:
                    unread.load()  # raises if it cannot be decoded
            return number, variants
        except TypeError:  # not the file's fault
            raise
        except Exception as error:  # Pillow's decoders raise exceptions of nearly any class
            if skips:
                return number, str(error)
            _ = self.dataset[number]  # raises the same error, and names the row
            raise


def _files(variants: Variants) -> Iterator[Unread]:
    return chain.from_iterable(unread_in(value) for row in variants.rows.values() for value in row.values())


class _Decoded(Dataset):
    """Decodes the files in the inputs of a batch."""

    def __init__(self, dataset: TrainingData):
        self.dataset = dataset

    def __getitem__(self, payload: tuple[list[CacheRequest], list[Sides]]) -> tuple[list[CacheRequest], list[Sides]]:
        batch, inputs = payload
        return batch, [self._decoded(request, sides) for request, sides in zip(batch, inputs, strict=True)]

    def _decoded(self, request: CacheRequest, sides: Sides) -> Sides:
        try:
            return {side: {name: read(value) for name, value in given.items()} for side, given in sides.items()}
        except Exception:  # Pillow's decoders raise exceptions of nearly any class
            _ = self.dataset[request.number]  # raises the same error, and names the row
            raise


def _unchanged(item: Any) -> Any:
    return item
