"""Engines spread a training over processes: DDP, DeepSpeed ZeRO or FSDP2, whichever the launcher's file asks for.

`engine.Engine` is DDP and defines what every engine does. `sharded.ShardedEngine` is the common part of `zero.ZeRO` and
`fsdp2.FSDP2`. `launcher` reads what `accelerate launch --config_file conf/accelerate/….yaml` asks for.
"""

from typing import TYPE_CHECKING

from .engine import Engine
from .launcher import asked, asked_cp_size

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Engine", "choose_engine"]


def choose_engine(accelerator: "Accelerator") -> Engine:
    """Return the engine that the launcher's file asks for.

    Raises:
        ValueError: The file asks for something that this trainer does not support.
    """
    cp_size = asked_cp_size(accelerator.num_processes)
    if asked("ACCELERATE_USE_DEEPSPEED"):
        from .zero import ZeRO

        return ZeRO(accelerator, cp_size)
    if asked("ACCELERATE_USE_FSDP"):
        from .fsdp2 import FSDP2

        return FSDP2(accelerator, cp_size)
    return Engine(accelerator, cp_size)
