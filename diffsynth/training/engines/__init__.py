"""How a training is spread over processes: by DDP, DeepSpeed's ZeRO or FSDP2, as the launcher's file says."""

from .engine import Engine
from .launcher import asked, asked_cp_size

__all__ = ["Engine", "choose_engine"]


def choose_engine(accelerator):
    """The engine of the launcher's file.

    Raises:
        ValueError: It asks for something that is not to be had here.
    """
    cp_size = asked_cp_size(accelerator.num_processes)
    if asked("ACCELERATE_USE_DEEPSPEED"):
        from .zero import ZeRO

        return ZeRO(accelerator, cp_size)
    if asked("ACCELERATE_USE_FSDP"):
        from .fsdp2 import FSDP2

        return FSDP2(accelerator, cp_size)
    return Engine(accelerator, cp_size)
