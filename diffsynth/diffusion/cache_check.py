"""What a cache holds, whether it is what was written, and what the data and the models would still give."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..core.data.cache import CacheIndex, Shard, rewrite
from ..core.data.cached_dataset import differences
from .cache_plan import CachePlan, describe

logger = logging.getLogger(__name__)

READERS = 8


def stats(path: str | Path) -> str:
    """Counts, as text."""
    index = CacheIndex(path)
    needed = Counter(key for record in index.records() for key in _keys(record))
    entries, shards = index.keys(), list(index.shards.values())
    size = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    made_of, sizes = index.about["made_of"], index.sizes()
    lines = [
        f"samples   {len(index)}, of {', '.join(f'{width} x {height}' for width, height in sizes)} pixels",
        f"entries   {len(entries)}, of which {len(entries - needed.keys())} are needed no more",
        f"shared    {sum(count > 1 for count in needed.values())} entries by several samples",
        f"files     {len(shards)}, {size / 1e6:.1f} MB, {size / max(len(index), 1) / 1e3:.1f} kB a sample",
        f"pipeline  {made_of['pipeline']}",
    ]
    return "\n".join(lines + [f"{name}  {unit}" for name, unit in made_of["units"].items()])


def collect_garbage(path: str | Path) -> str:
    """Pack anew the shards that hold what no sample needs, or what another one holds too; what that gave, as text."""
    index = CacheIndex(path, writable=True)
    index.match_shards()
    shards, needed = index.shards, {key for record in index.records() for key in _keys(record)}
    before = sum(shard.path.stat().st_size for shard in shards.values())
    own = {number: index.keys_of(number) & needed for number in shards}
    wasteful = {number: shard for number, shard in shards.items() if shard.contents.keys() != own[number]}
    if wasteful:
        rewrite(wasteful.values(), needed)
        index.match_shards()
    after = sum(shard.path.stat().st_size for shard in index.shards.values())
    index.close()
    return f"{len(wasteful)} of {len(shards)} files packed anew, {(before - after) / 1e6:.1f} MB freed"


def mend(index: CacheIndex) -> list[str]:
    """Drop the damaged entries of damaged shards, so that they are made again; names those shards."""
    damaged = damaged_shards(index)
    for shard in damaged:
        whole = shard.whole_entries()
        logger.warning("%s is damaged; %d of its entries are whole and kept.", shard.path, len(whole))
        rewrite([shard], whole)
    if damaged:
        index.match_shards()
    return [shard.path.name for shard in damaged]


def damaged_shards(index: CacheIndex) -> list[Shard]:
    """Those whose bytes are not what was written; reads all of them."""
    shards = [shard for shard in index.shards.values() if shard.path.is_file()]
    with ThreadPoolExecutor(READERS) as pool:
        return [shard for shard, whole in zip(shards, pool.map(Shard.is_whole, shards), strict=True) if not whole]


def verify(dataset, module, path: str | Path) -> list[str]:
    """Everything in which a cache is not what was written, or not what `dataset` and `module` would give now."""
    index = CacheIndex(path)
    plan = CachePlan(module)
    gone = [shard.path for shard in index.shards.values() if not shard.path.is_file()]
    lines = [f"{path} is missing" for path in gone]
    for shard in damaged_shards(index):
        lost = len(index.keys_of(index.number_of(shard)) - shard.whole_entries())
        lines.append(f"{shard.path} is damaged: {lost} of its entries")
    lines += differences(index.about["made_of"], plan.about())
    lines += _changed_samples(dataset, module, plan, index)
    index.close()
    return lines


def _changed_samples(dataset, module, plan: CachePlan, index: CacheIndex) -> Iterator[str]:
    """What differs between the samples there are and those in the cache."""
    entries = index.keys()
    if dataset.size != len(index):
        yield f"there are {dataset.size} samples, the cache holds {len(index)}"
    for number in range(min(dataset.size, len(index))):
        now, cached = describe(module, plan, dataset.variants(number))[0]["variants"], index.record(number)["variants"]
        for name, variant in now.items():
            changes = _changes(variant["row"], cached.get(name, {"row": {}, "runs": []}), entries)
            yield from (f"sample {number}{f' ({name})' if name else ''}: {change}" for change in changes)


def _changes(row: dict, cached: dict, entries: set[str]) -> Iterator[str]:
    for column, value in row.items():
        if json.loads(json.dumps(value)) != cached["row"].get(column):
            yield f"another {column}"
    missing = sum(key not in entries for key, _ in cached["runs"])
    if missing:
        yield f"{missing} entries are not there"


def _keys(record: dict) -> Iterator[str]:
    return (key for variant in record["variants"].values() for key, _ in variant["runs"])
