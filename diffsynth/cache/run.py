"""The configuration of make_cache.py: one dataclass whose fields are the top level of conf/make_cache.yaml."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Command = Literal["make", "verify", "stats", "gc"]
COMMANDS = get_args(Command)


@dataclass(kw_only=True)
class CacheRun:
    """One command on one cache; its fields are the top level of conf/make_cache.yaml.

    Args:
        path: Folder of the cache.
        model, dataset, task, lora, template: Those of the training that will read the cache (`training.run.Run`).
        command: `make` makes or completes the cache, `verify` compares it with its data and models, `stats` counts its
            content, and `gc` deletes entries that no sample needs.
        batch_size: Samples per forward pass of an encoder.
        shard_megabytes: Size of a shard file, in MiB.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: Seed of a template's initial weights; must be the training's.
    """

    path: str
    model: Any
    dataset: Any
    task: Any
    lora: Any = None
    template: Any = None
    command: Command = "make"
    batch_size: int = 8
    shard_megabytes: int = 256
    device: str = "auto"
    seed: int = 0
