"""The cache on disk: outputs of frozen networks as entries by key, safetensors shards that hold them, and an index."""

from .index import FORMAT, CacheIndex, DamagedCache, keys_of
from .requests import KEPT_FILE, CacheRequest, CacheRequests, UnitJob
from .shards import DamagedShard, Entry, Shard, ShardWriter, rewrite

__all__ = [
    "FORMAT",
    "KEPT_FILE",
    "CacheIndex",
    "DamagedCache",
    "DamagedShard",
    "Entry",
    "Shard",
    "ShardWriter",
    "CacheRequest",
    "CacheRequests",
    "UnitJob",
    "keys_of",
    "rewrite",
]
