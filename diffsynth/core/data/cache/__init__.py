"""What frozen networks made of a data set, on disk: entries by content, safetensors shards, an index."""

from .index import CacheIndex, DamagedCache
from .shards import DamagedShard, Entry, Shard, ShardWriter, rewrite
from .wishes import Wish, Wishes

__all__ = ["CacheIndex", "DamagedCache", "DamagedShard", "Entry", "Shard", "ShardWriter", "Wish", "Wishes", "rewrite"]
