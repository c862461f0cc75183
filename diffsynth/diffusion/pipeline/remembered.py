"""`UnitMemory`: keeps the outputs of frozen units in host memory, because they are the same in every epoch."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...core.host_memory import sent

Inputs = tuple[dict, dict, dict]


class UnitMemory:
    """Outputs of units in host memory, by sample, until the budget is spent.

    Nothing is evicted: in shuffled epochs no sample is needed sooner than another.

    Args:
        gigabytes: The budget in GiB; 0 keeps nothing.
    """

    def __init__(self, gigabytes: float):
        self.left = int(gigabytes * 2**30)
        self.kept: dict[Hashable, Inputs] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.kept

    def get(self, key: Hashable, make: Callable[[], Inputs], device: torch.device) -> Inputs:
        """The result of `make()` for this key, from memory if it is there, with tensors on `device`."""
        if key in self.kept:
            return tuple(to_device(side, device) for side in self.kept[key])
        made = make()
        size = sum(map(_bytes, made))
        if size <= self.left:
            self.left -= size
            self.kept[key] = tuple(to_device(side, torch.device("cpu")) for side in made)
        return made


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor to a device, or all tensors in a dict or list."""
    if isinstance(value, dict):
        return {name: to_device(element, device) for name, element in value.items()}
    if isinstance(value, list):
        return [to_device(element, device) for element in value]
    return sent(value, device) if isinstance(value, Tensor) else value


def _bytes(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, Tensor) else 0
