"""What a cache holds, whether it is what was written, and what the data and the models would still give."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ..core.data.cache import CacheIndex, Shard, keys_of, rewrite
from ..core.data.cached_dataset import differences
from .keys import CacheKeys, describe

logger = logging.getLogger(__name__)

READERS = 8


def stats(path: str | Path) -> str:
    """Counts, as text."""
    index = CacheIndex(path)
    index.require_finished()
    needed = Counter(key for record in index.records() for key in set(keys_of(record)))
    entries, shards = index.keys(), list(index.shards.values())
    size = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    made_of, sizes = index.about["made_of"], index.sizes()
    lines = [
        f"samples   {len(index)}, of {', '.join(' x '.join(map(str, size)) for size in sizes)} pixels",
        f"entries   {len(entries)}, of which {len(entries - needed.keys())} are needed no more",
        f"shared    {sum(count > 1 for count in needed.values())} entries by several samples",
        f"files     {len(shards)}, {size / 1e6:.1f} MB, {size / len(index) / 1e3:.1f} kB a sample",
        f"pipeline  {made_of['pipeline']}",
    ]
    index.close()
    return "\n".join(lines + [f"{name}  {unit}" for name, unit in made_of["units"].items()])


def collect_garbage(path: str | Path) -> str:
    """Pack anew the shards that hold what no sample needs, or what another one holds too; what that gave, as text.

    Raises:
        DamagedCache: The cache is not finished, so that it is not known what is needed.
    """
    with closing(CacheIndex(path)) as finished:
        finished.require_finished()
    index = CacheIndex(path, writable=True)
    index.match_shards()
    index.require_finished()
    shards, needed = index.shards, {key for record in index.records() for key in keys_of(record)}
    before = _bytes_of(shards.values())
    own = {number: keys & needed for number, keys in index.keys_by_shard().items()}
    wasteful = [number for number, shard in shards.items() if shard.contents.keys() != own.get(number, set())]
    if wasteful:
        keep = set().union(*(own.get(number, ()) for number in wasteful))
        rewrite([shards[number] for number in wasteful], keep)
        index.match_shards()
    after = _bytes_of(index.shards.values())
    index.close()
    return f"{len(wasteful)} of {len(shards)} files packed anew, {(before - after) / 1e6:.1f} MB freed"


def _bytes_of(shards: Iterable[Shard]) -> int:
    return sum(shard.path.stat().st_size for shard in shards)


def mend(index: CacheIndex, damaged: Iterable[Shard]) -> list[str]:
    """Drop the damaged entries of damaged shards, so that they are made again; names those shards."""
    names = []
    for shard in damaged:
        whole = shard.whole_entries()
        logger.warning("%s is damaged; %d of its entries are whole and kept.", shard.path, len(whole))
        rewrite([shard], whole)
        names.append(shard.path.name)
    if names:
        index.match_shards()
    return names


def damaged_shards(shards: Mapping[int, Shard]) -> dict[int, Shard]:
    """Those that are there, and whose bytes are not what was written; reads all of them."""
    there = {number: shard for number, shard in shards.items() if shard.path.is_file()}
    with ThreadPoolExecutor(READERS) as pool:
        whole = dict(zip(there, pool.map(Shard.is_whole, there.values()), strict=True))
    return {number: shard for number, shard in there.items() if not whole[number]}


def verify(dataset, module, path: str | Path) -> list[str]:
    """Everything in which a cache is not what was written, or not what `dataset` and `module` would give now."""
    index = CacheIndex(path)
    index.require_finished()
    keys, shards, entries = CacheKeys(module), index.shards, index.keys_by_shard()
    gone = {number: shard for number, shard in shards.items() if not shard.path.is_file()}
    lines = [f"{shard.path} is missing: {len(entries.get(number, ()))} entries" for number, shard in gone.items()]
    for number, shard in damaged_shards(shards).items():
        own = entries.get(number, set())
        lines.append(f"{shard.path} is damaged: {len(own - shard.whole_entries())} of {len(own)} entries")
    lines += differences(index.about["made_of"], keys.about())
    lines += _changed_samples(dataset, module, keys, index)
    index.close()
    return lines


def _changed_samples(dataset, module, keys: CacheKeys, index: CacheIndex) -> Iterator[str]:
    """What differs between the samples there are and those in the cache."""
    entries, left_out = index.keys(), set(index.about["left_out"])
    numbers = [number for number in range(dataset.size) if number not in left_out]
    if len(numbers) != len(index):
        yield f"there are {len(numbers)} samples, the cache holds {len(index)}"
    for number, record in zip(numbers, index.records(), strict=False):
        now = describe(module, keys, dataset.variants(number))[0]["variants"]
        for name, variant in now.items():
            changes = _changes(variant["row"], record["variants"].get(name, {"row": {}, "runs": []}), entries)
            yield from (f"sample {number}{f' ({name})' if name else ''}: {change}" for change in changes)


def _changes(row: dict, cached: dict, entries: set[str]) -> Iterator[str]:
    for column, value in row.items():
        if json.loads(json.dumps(value)) != cached["row"].get(column):
            yield f"another {column}"
    missing = sum(key not in entries for key, _ in cached["runs"])
    if missing:
        yield f"{missing} entries are not there"
