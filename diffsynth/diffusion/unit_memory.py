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
            return tuple(to_device(side, device) for side in self.kept[key])
        made = make()
        size = sum(value.nbytes for side in made for value in side.values() if isinstance(value, Tensor))
        if size <= self.left:
            self.left -= size
            self.kept[key] = tuple(to_device(side, torch.device("cpu")) for side in made)
        return made


def to_device(inputs: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
