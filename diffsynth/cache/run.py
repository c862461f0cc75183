"""What the making of a cache is made of: the top level of its configuration."""

from dataclasses import dataclass
from typing import Any, Literal

COMMANDS = ("make", "verify", "stats", "gc")


@dataclass(kw_only=True)
class CacheRun:
    """One cache; the fields are the top level of conf/make_cache.yaml.

    Args:
        path: The cache's folder.
        model, dataset, task, lora, template: As those of the training (`training.run.Run`).
        command: `make` completes the cache, `verify` compares it, `stats` counts, `gc` deletes what nothing needs.
        batch_size: Samples that go through an encoder together.
        shard_megabytes: Size of a file, in MiB.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: Of what a template's constructor draws at random; the training's.
    """

    path: str
    model: Any
    dataset: Any
    task: Any
    lora: Any = None
    template: Any = None
    command: Literal["make", "verify", "stats", "gc"] = "make"
    batch_size: int = 8
    shard_megabytes: int = 256
    device: str = "auto"
    seed: int = 0
