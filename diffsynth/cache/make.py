"""Stage one of two: what frozen units make of a data set, once, on disk.

1. Plan: the keys of everything that each sample needs, from the bytes of its files; no network is loaded.
2. Make: what is not there yet, one unit after the other, so that only its own networks are in memory.
3. Index: of which entries each sample consists.

Killed at any moment, the same command goes on with what lacks.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..core.data.cache import FORMAT, CacheIndex, CacheRequest, CacheRequests, Shard, ShardWriter
from ..core.data.cached_dataset import captions_of
from ..core.data.operators.unread import Unread, Variants, read, unread_in
from ..core.files import remove_leftovers
from ..core.progress import ProgressBar
from ..core.signals import leave_to_parent
from ..diffusion.flow_match import TRAINING_STEPS
from ..diffusion.training_module import PipelineTrainingModule
from .keys import CacheKeys, Sides, describe, pipeline_inputs
from .verify import damaged_shards, mend

logger = logging.getLogger(__name__)


@dataclass
class CacheReport:
    """What a run did.

    Args:
        samples: How many the cache has now.
        needed: Entries that they need.
        made: Those that were made now, by unit; the others were there.
        lost: Shards that were gone or damaged.
        left_out: Numbers of samples that cannot be read, where the data set has on_error="skip".
    """

    samples: int
    needed: int
    made: dict[str, int]
    lost: Sequence[str]
    left_out: Sequence[int]

    def __str__(self) -> str:
        made = ", ".join(f"{count} of {name}" for name, count in self.made.items()) or "none"
        lost = f"; {len(self.lost)} damaged or missing files were replaced" if self.lost else ""
        left_out = f"; {len(self.left_out)} samples cannot be read and are left out" if self.left_out else ""
        return f"{self.samples} samples of {self.needed} entries, made now: {made}{lost}{left_out}"


def launch_data_process_task(
    accelerator,
    dataset,
    module: PipelineTrainingModule,
    path: str | Path,
    batch_size: int = 8,
    num_workers: int = 0,
    shard_bytes: int = 2**28,
) -> CacheReport:
    """Make or complete the cache of a data set in the folder `path`; all processes call it.

    Args:
        dataset: Gives the `Variants` of each of its `size` samples, `dataset.variants(number)`, and whether it is to be
            left out where it cannot be read, `dataset.skips(number)`.
        module: What will be trained, built but not loaded; what it leaves frozen is cached.
        batch_size: Samples that go through a network together, where their shapes agree.
        num_workers: Processes that read and decode ahead.
        shard_bytes: Size of a file.

    Raises:
        ValueError: Nothing of this training is frozen, a model that makes it is not there, samples have no end of
            variants, or one cannot be read.
        TypeError: An input of the pipeline is neither plain data nor a file.
    """
    folder, is_main = Path(path), accelerator.is_main_process
    index, lost = CacheIndex(folder, writable=is_main), []
    stage = CacheMaker(accelerator, dataset, module, index, batch_size, num_workers)
    if is_main:
        remove_leftovers(folder)
        lost = index.match_shards()
    accelerator.wait_for_everyone()
    damaged = stage.damaged_shards()
    if is_main:
        lost += mend(index, damaged.values())
    accelerator.wait_for_everyone()
    requests = stage.gather_requests()
    made = stage.make(requests, shard_bytes)
    if is_main:
        index.match_shards()
        index.put(requests.samples(), stage.about(requests))
    accelerator.wait_for_everyone()
    report = CacheReport(len(index), len(requests), made, lost, stage.left_out)
    requests.close()
    index.close()
    accelerator.wait_for_everyone()
    if is_main:
        remove_leftovers(folder)
    return report


class CacheMaker:
    """One process's part in making a cache; see `launch_data_process_task`."""

    def __init__(self, accelerator, dataset, module, index: CacheIndex, batch_size: int, num_workers: int):
        self.accelerator, self.dataset, self.module, self.index = accelerator, dataset, module, index
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.keys, self.left_out = CacheKeys(module), []
        self.keys.check()
        self.datasets = [*dataset.datasets.values()]
        self.augmentations = [own.augmentation for own in self.datasets]
        for augmentation in self.augmentations:
            augmentation.choices([1.0])  # refuses what has no end

    def about(self, requests: CacheRequests) -> dict[str, Any]:
        """What the cache is made of, and how."""
        return {
            "format": FORMAT,
            "made_of": self.keys.about(),
            "captions": [captions_of(augmentation) for augmentation in self.augmentations],
            "variants": requests.variants(),
            "by_size": len(self.dataset.order(batch_size=1, seed=0).buckets) > 1,
            "parts": self._parts(),
            "left_out": self.left_out,
        }

    def _parts(self) -> list[tuple[int, str]]:
        """How many samples are from each data set, and how often a pass shows each of them."""
        parts, start = [], 0
        shares = self.dataset.passes()
        for dataset, share in zip(self.datasets, shares.values(), strict=True):
            lacking = sum(start <= number < start + dataset.size for number in self.left_out)
            parts.append((dataset.size - lacking, str(share)))
            start += dataset.size
        return parts

    # What is there

    def damaged_shards(self) -> dict[int, Shard]:
        """By number; each process reads its part of them."""
        shards = self.index.shards
        own = {number: shard for place, (number, shard) in enumerate(shards.items()) if place % self.world == self.rank}
        return {number: shards[number] for number in sorted(gather_object([*damaged_shards(own)]))}

    # What is needed

    def gather_requests(self) -> CacheRequests:
        """What all samples need."""
        paths = [self.index.folder / f".partial-requests-{rank}.sqlite" for rank in range(self.world)]
        own = CacheRequests(paths[self.rank])
        numbers = range(self.rank, self.dataset.size, self.world)
        progress = self._progress(len(numbers), "sample planned")
        for count, (number, variants) in enumerate(self._load(_Identified(self.dataset), numbers), 1):
            if isinstance(variants, str):
                logger.warning("Sample %d is left out: %s", number, variants)
                self.left_out.append(number)
            else:
                record, wanted = describe(self.module, self.keys, variants)
                wanted = [CacheRequest(job, shape, number, name) for job, shape, name in wanted]
                own.add(number, variants.size, record, wanted)
            progress.advance(count)
        progress.close()
        own.close()
        self.left_out = sorted(gather_object(self.left_out))
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            merged = CacheRequests(paths[0], new=False)
            merged.merge(paths[1:])
            merged.close()
        self.accelerator.wait_for_everyone()
        return CacheRequests(paths[0], new=False)

    # Making it

    def make(self, requests: CacheRequests, shard_bytes: int) -> dict[str, int]:
        """Make this process's part of what is not there; how many entries all made, by unit."""
        made = Counter()
        missing = sum(1 for _ in self._missing(requests))
        progress = self._progress(len(range(self.rank, missing, self.world)), "batch made")
        own = islice(self._missing(requests), self.rank, None, self.world)
        self.module.pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)
        self.module.pipe.eval().requires_grad_(False)
        with ShardWriter(self.index.shard_folder, shard_bytes) as writer:
            for unit, batches in groupby(own, key=lambda batch: batch[0].job.unit):
                for batch, entries in self._run_all(unit, batches):
                    for request, entry in zip(batch, entries, strict=True):
                        if request.job.key not in self.index:
                            writer.add(request.job.key, entry)
                            made["images" if unit < 0 else type(self.keys.units[unit]).__name__] += 1
                    progress.advance(progress.done + 1)
        progress.close()
        self.accelerator.wait_for_everyone()
        return dict(sum(map(Counter, gather_object([dict(made)])), Counter()))

    def _missing(self, requests: CacheRequests) -> Iterator[list[CacheRequest]]:
        batches = requests.batches(self.batch_size)
        return (batch for batch in batches if any(request.job.key not in self.index for request in batch))

    def _run_all(
        self, unit: int, batches: Iterable[list[CacheRequest]]
    ) -> Iterator[tuple[list[CacheRequest], list[dict]]]:
        """What one unit makes of batches, its networks in memory meanwhile."""
        networks = self.module.pipe.models_of(self.keys.needed_units(unit), model_fn=False)
        with self.module.pipe.loaded(networks):
            for batch, inputs in self._load(_Read(self.dataset), map(self._inputs, batches)):
                yield batch, self._run(batch, inputs)

    def _run(self, batch: Sequence[CacheRequest], inputs: Sequence[Sides]) -> list[dict]:
        device = self.module.pipe.device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), self.accelerator.autocast(), forked:
            torch.manual_seed(0)  # units may draw
            return self.keys.make([request.job for request in batch], inputs)

    def _inputs(self, batch: list[CacheRequest]) -> tuple[list[CacheRequest], list[Sides]]:
        """A batch with the inputs that its unit reads, files unread."""
        names = {name for unit in self.keys.needed_units(batch[0].job.unit) for name in unit.fetch_input_params()}
        inputs = []
        for request in batch:
            sides = pipeline_inputs(self.module, self.dataset.variants(request.number).rows[request.variant])
            wanted = names | {request.job.name}
            inputs.append({side: {n: v for n, v in given.items() if n in wanted} for side, given in sides.items()})
        return batch, inputs

    def _progress(self, steps: int, unit: str) -> ProgressBar:
        return ProgressBar(steps, visible=self.accelerator.is_main_process, unit=unit)

    def _load(self, dataset: Dataset, items: Iterable) -> DataLoader:
        """`dataset[item]` of all items in order, ahead of time where there are workers."""
        return DataLoader(
            dataset,
            sampler=items,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=leave_to_parent,
        )


class _Identified(Dataset):
    """The variants of a sample, the bytes of their files hashed; or why it cannot be read, if it is to be left out."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, Variants | str]:
        skips = self.dataset.skips(number)
        try:
            variants = self.dataset.variants(number)
            for unread in _files(variants):
                _ = unread.identity  # kept with it
                if skips:
                    unread.load()  # whether it can be
            return number, variants
        except TypeError:  # not the file's fault
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything
            if skips:
                return number, str(error)
            _ = self.dataset[number]  # raises the same, and says in which row
            raise


def _files(variants: Variants) -> Iterator[Unread]:
    return chain.from_iterable(unread_in(value) for row in variants.rows.values() for value in row.values())


class _Read(Dataset):
    """Batches of inputs, decoded."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, payload: tuple[list[CacheRequest], list[Sides]]) -> tuple[list[CacheRequest], list[Sides]]:
        batch, inputs = payload
        return batch, [self._decoded(request, sides) for request, sides in zip(batch, inputs, strict=True)]

    def _decoded(self, request: CacheRequest, sides: Sides) -> Sides:
        try:
            return {side: {name: read(value) for name, value in given.items()} for side, given in sides.items()}
        except Exception:  # Pillow's decoders raise nearly anything
            _ = self.dataset[request.number]  # raises the same, and says in which row
            raise


def _as_it_is(item):
    return item
