"""How a training is spread over processes: by DDP, DeepSpeed's ZeRO or FSDP2, as the launcher's file says."""

from .engine import Engine
from .launcher import choose_engine

__all__ = ["Engine", "choose_engine"]
