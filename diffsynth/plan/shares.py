"""Computes what one of N devices takes under each engine, from the footprint of a training on a single device.

ZeRO: Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054, Fig. 1); offload: Ren et al. 2021
(https://arxiv.org/abs/2101.06840). FSDP2 shards as ZeRO-3 does.
"""

from dataclasses import dataclass

from .footprint import MemoryFootprint

GATHERED_BLOCKS = 2  # engines that shard weights compute with one block while they gather the next


@dataclass(frozen=True)
class Share:
    """What each of several devices takes under one engine.

    Args:
        engine: Name of the launcher's file, conf/accelerate/<engine>.yaml; `ddp` on one device is a single process.
        devices: Number of devices.
        device: Bytes on each device.
        host: Bytes of host memory for each device.
    """

    engine: str
    devices: int
    device: int
    host: int = 0


def shares(footprint: MemoryFootprint, devices: int) -> list[Share]:
    """Return the share of each of `devices` devices under every engine."""

    def shard(size: int) -> int:
        return -(-size // devices)  # rounded up

    state = shard(footprint.gradients + footprint.optimizer)
    master_weights = shard(footprint.master_weights)
    weights = shard(footprint.weights - footprint.encoders)
    gathered = footprint.encoders + GATHERED_BLOCKS * footprint.block
    passing = footprint.passing - footprint.gradients + footprint.average
    buckets = footprint.gradients if devices > 1 else 0  # DDP has room for them in the forward pass too; an upper bound
    return [
        Share("ddp", devices, footprint.peak + buckets),
        Share("zero2", devices, footprint.weights + state + master_weights + passing),
        Share("fsdp2", devices, weights + state + gathered + passing),
        Share("zero2_offload", devices, footprint.weights + passing, state + master_weights),
        Share("zero3_offload", devices, gathered + passing, weights + state + master_weights),
    ]
