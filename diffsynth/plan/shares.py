"""What one of N devices holds under each engine, by arithmetic on what one device holds alone.

ZeRO: Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054, Fig. 1); offload: Ren et al. 2021
(https://arxiv.org/abs/2101.06840). FSDP2 shards as ZeRO-3 does.
"""

from dataclasses import dataclass

from .footprint import MemoryFootprint

GATHERED_BLOCKS = 2  # one is computed with while the next is gathered


@dataclass(frozen=True)
class Share:
    """Bytes on each of so many devices, and in the host's memory for each device.

    Args:
        engine: Name of the launcher's file, conf/accelerate/<engine>.yaml; `ddp` on one device is one process.
    """

    engine: str
    devices: int
    device: int
    host: int = 0


def shares(footprint: MemoryFootprint, devices: int) -> list[Share]:
    """Every engine's share for so many devices."""
    own = footprint.gradients + footprint.optimizer
    state, master_weights, weights = (
        -(-whole // devices) for whole in (own, footprint.master_weights, footprint.weights - footprint.encoders)
    )
    gathered, passing = (
        footprint.encoders + GATHERED_BLOCKS * footprint.block,
        footprint.passing - footprint.gradients + footprint.average,
    )
    buckets = footprint.gradients if devices > 1 else 0  # in which DDP reduces, apart from the gradients themselves
    return [
        Share("ddp", devices, footprint.peak + buckets),
        Share("zero2", devices, footprint.weights + state + master_weights + passing),
        Share("fsdp2", devices, weights + state + gathered + passing),
        Share("zero2_offload", devices, footprint.weights + passing, state + master_weights),
        Share("zero3_offload", devices, gathered + passing, weights + state + master_weights),
    ]
