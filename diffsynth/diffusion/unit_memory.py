"""What frozen units made of a sample is the same every epoch: keep it."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Inputs = tuple[dict, dict, dict]


class UnitMemory:
    """Results of units in host memory, by sample, until the budget is spent.

    Nothing is thrown out to make room: in a shuffled epoch every sample is as far away as any other.

    Args:
        gigabytes: The budget in GiB; 0 keeps nothing.
    """

    def __init__(self, gigabytes: float):
        self.left = int(gigabytes * 2**30)
        self.kept: dict[Hashable, Inputs] = {}

    def get(self, key: Hashable, make: Callable[[], Inputs], device: torch.device) -> Inputs:
        """What `make` returned for this key, now or before, on `device`."""
        if key in self.kept:
            return _to(self.kept[key], device)
        made = make()
        size = sum(value.nbytes for side in made for value in side.values() if isinstance(value, Tensor))
        if size <= self.left:
            self.left -= size
            self.kept[key] = _to(made, torch.device("cpu"))
        return made


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    return tuple({k: v.to(device) if isinstance(v, Tensor) else v for k, v in side.items()} for side in inputs)
