"""Counts, checks and tidies a cache: `stats`, `verify` and `collect_garbage` are commands of make_cache.py."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.data import TrainingData
from ..core.data.cache import CacheIndex, Shard, keys_of, rewrite
from ..core.data.cached_dataset import differences
from ..core.data.sources.storage import is_remote
from ..core.json_text import fits, parse, to_json
from ..core.process.locks import locked
from .keys import CacheKeys, describe

if TYPE_CHECKING:
    from ..diffusion.training_module import PipelineTrainingModule

logger = logging.getLogger(__name__)

READERS = 8  # threads that read files; a guess
COMPARED = 256  # samples at the beginning by which a data set is recognised at another path; a guess


def stats(path: str | Path) -> str:
    """Return the numbers of samples, entries and files in a cache, as lines of text."""
    index = CacheIndex(path)
    index.require_finished()
    needed = Counter(key for record in index.records() for key in set(keys_of(record)))
    entries, shards = index.keys(), list(index.shards.values())
    size = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    made_of, sizes = index.about["made_of"], index.sizes()
    lines = [
        f"samples   {len(index)}, of {', '.join(' x '.join(map(str, size)) for size in sizes)} pixels",
        f"entries   {len(entries)}, of which {len(entries - needed.keys())} are no longer needed",
        f"shared    {sum(count > 1 for count in needed.values())} entries by several samples",
        f"files     {len(shards)}, {size / 1e6:.1f} MB, {size / len(index) / 1e3:.1f} kB per sample",
        f"pipeline  {made_of['pipeline']}",
    ]
    index.close()
    return "\n".join(lines + [f"{name}  {unit}" for name, unit in made_of["units"].items()])


@contextmanager
def _finished_cache(path: str | Path, writable: bool = False) -> Iterator[CacheIndex]:
    """Inside, the index of a finished cache, which no other process writes meanwhile.

    Nothing is locked in a folder that this process cannot write.
    """
    with locked(path) if os.access(path, os.W_OK) else nullcontext():
        with closing(CacheIndex(path)) as index:
            index.require_finished()
        with closing(CacheIndex(path, writable)) as index:
            yield index


def collect_garbage(path: str | Path) -> str:
    """Rewrite the shards that have entries that no sample needs, or that another shard has too.

    Returns:
        How many files were rewritten and how many bytes that freed, as text.

    Raises:
        DamagedCache: The cache is not finished, so that the needed entries are not known.
        FolderInUse: Another process makes, checks or tidies this cache.
    """
    with _finished_cache(path, writable=True) as index:
        index.match_shards()
        index.require_finished()
        shards, needed = index.shards, {key for record in index.records() for key in keys_of(record)}
        before = _bytes_of(shards.values())
        own = {number: keys & needed for number, keys in index.keys_by_shard().items()}
        wasteful = [number for number, shard in shards.items() if shard.contents.keys() != own.get(number, set())]
        if wasteful:
            keep = set().union(*(own.get(number, ()) for number in wasteful))
            _replace(index, rewrite([shards[number] for number in wasteful], keep))
        after = _bytes_of(index.shards.values())
    return f"{len(wasteful)} of {len(shards)} files rewritten, {(before - after) / 1e6:.1f} MB freed"


def _replace(index: CacheIndex, obsolete: Iterable[Path]) -> None:
    """Let the index read what is in obsolete shards from others, and only then delete them."""
    obsolete = list(obsolete)
    index.match_shards(without=obsolete)
    for path in obsolete:
        path.unlink()


def _bytes_of(shards: Iterable[Shard]) -> int:
    return sum(shard.path.stat().st_size for shard in shards)


def mend(index: CacheIndex, damaged: Iterable[Shard]) -> list[str]:
    """Delete the damaged entries of damaged shards, so that they are made again; return the names of these shards."""
    names, obsolete = [], []
    for shard in damaged:
        intact = shard.whole_entries()
        logger.warning("%s is damaged; %d of its entries are intact and kept.", shard.path, len(intact))
        obsolete += rewrite([shard], intact)
        names.append(shard.path.name)
    if names:
        _replace(index, obsolete)
    return names


def damaged_shards(shards: Mapping[int, Shard]) -> dict[int, Shard]:
    """Return the shards whose files exist but differ from what was written; reads every byte of all files."""
    existing = {number: shard for number, shard in shards.items() if shard.path.is_file()}
    with ThreadPoolExecutor(READERS) as pool:
        is_intact = dict(zip(existing, pool.map(Shard.is_whole, existing.values()), strict=True))
    return {number: shard for number, shard in existing.items() if not is_intact[number]}


def verify(dataset: TrainingData, module: "PipelineTrainingModule", path: str | Path) -> list[str]:
    """List missing and damaged files of a cache, and everything that `dataset` and `module` would make differently now.

    Args:
        dataset: The data set that was cached.
        module: The training module that will read the cache; its models are built but not loaded.
        path: Folder of the cache.

    Raises:
        DamagedCache: The cache is not finished.
        FolderInUse: Another process makes, checks or tidies this cache.
        ValueError: The cache was made of another data set.
    """
    with _finished_cache(path) as index:
        keys, shards, entries = CacheKeys(module), index.shards, index.keys_by_shard()
        samples = (dataset.variants(number) for number in range(dataset.size))
        check_same_data(index, dataset, (describe(module, keys, variants)[0] for variants in samples))
        missing = {number: shard for number, shard in shards.items() if not shard.path.is_file()}
        lines = [f"{shard.path} is missing: {len(entries.get(n, ()))} entries" for n, shard in missing.items()]
        for number, shard in damaged_shards(shards).items():
            own = entries.get(number, set())
            lines.append(f"{shard.path} is damaged: {len(own - shard.whole_entries())} of {len(own)} entries")
        made_otherwise = differences(index.about["made_of"], keys.about())
        lines += made_otherwise
        lines += _changed_samples(dataset, module, keys, index, compares_keys=not made_otherwise)
    return lines


def locations(dataset: TrainingData) -> list[str]:
    """Return the absolute paths, or the URLs, of the tables or folders that a data set's rows are from."""
    paths = [own.metadata_path for own in dataset.datasets.values()]
    return [path if is_remote(path) else os.path.abspath(path) for path in paths]


def check_same_data(index: CacheIndex, dataset: TrainingData, records: Iterable[Mapping]) -> None:
    """Check that a cache was not made of another data set, which would replace all of its samples.

    A data set at another path is the same one if the cache has one of its first `COMPARED` samples, or if nothing is
    left at the path that the cache was made of. It is read no further than to the first such sample.

    Args:
        records: The data set's samples as `describe` returns them.

    Raises:
        ValueError: It was; the message names that data set.
    """
    made_of = index.about.get("data_sets")  # caches until 2026-11-30 do not say it
    if not fits(made_of, [str]) or made_of == locations(dataset):
        return
    if not all(is_remote(place) or os.path.exists(place) for place in made_of):
        return
    cached = {row for record in islice(index.records(), COMPARED) for row in _rows(record)}
    if cached.isdisjoint(row for record in islice(records, COMPARED) for row in _rows(record)):
        raise ValueError(
            f"{index.folder} was made of {', '.join(made_of)} ({len(index)} samples), not of {dataset.metadata_path}; "
            "type that data set's keys too (dataset=… dataset.path=…), or path=… for another cache."
        )


def _rows(record: Mapping) -> Iterator[str]:
    return (to_json(variant["row"], sort_keys=True) for variant in record["variants"].values())


def _changed_samples(
    dataset: TrainingData, module: "PipelineTrainingModule", keys: CacheKeys, index: CacheIndex, compares_keys: bool
) -> Iterator[str]:
    """Yield the differences between the data set's samples and those in the cache.

    Args:
        compares_keys: Whether equal rows must have equal keys: the cache was made by these networks and this code.
    """
    entries, skipped = index.keys(), set(index.about["left_out"])
    numbers = [number for number in range(dataset.size) if number not in skipped]
    if len(numbers) != len(index):
        yield f"the data set has {len(numbers)} samples, the cache has {len(index)}"
    for number, record in zip(numbers, index.records(), strict=False):
        now = describe(module, keys, dataset.variants(number))[0]["variants"]
        for name, variant in now.items():
            cached = record["variants"].get(name, {"row": {}, "runs": []})
            changes = [*_changes(variant["row"], cached, entries)]
            others = {tuple(run) for run in variant["runs"]} - {tuple(run) for run in cached["runs"]}
            if compares_keys and others and not changes:
                changes = [f"{len(others)} of {len(variant['runs'])} entries are those of other inputs"]
            yield from (f"sample {number}{f' ({name})' if name else ''}: {change}" for change in changes)


def _changes(row: dict, cached: dict, entries: set[str]) -> Iterator[str]:
    """Yield the columns in which a row differs from the cached one, and how many of its entries are missing."""
    for column, value in row.items():
        if parse(to_json(value)) != cached["row"].get(column):
            yield f"{column} differs"
    missing = sum(key not in entries for key, _ in cached["runs"])
    if missing:
        yield f"{missing} entries are missing"
