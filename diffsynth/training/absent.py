"""What stands in a training for a part that it does not have, so that its loop asks nobody whether they are there."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor


class NoEMA:
    """No average of the weights."""

    weights = ("raw",)
    average: Sequence[Tensor] = ()

    def start(self, parameters: Sequence[Tensor]) -> None:
        pass

    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        pass


class NoCheckpoints:
    """No state is kept."""

    saves = False

    def resume(self, accelerator, state, identity: Mapping[str, Any]) -> bool:
        return False

    def check_room_for_run(self, size: int) -> None:
        pass

    def keep_if_due(self, accelerator, state, identity: Mapping[str, Any], last: bool) -> None:
        pass


class NoLogger:
    """No numbers are written."""

    def start(self, step: int, resumed: bool) -> None:
        pass

    def due(self, step: int, done: bool) -> bool:
        return False

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None:
        pass

    def finish(self) -> None:
        pass


class NoValidation:
    """Nothing is evaluated."""

    datasets: Mapping[str, Any] = {}
    saved: Sequence = ()
    numbers: Sequence[str] = ()

    def check(self, ema) -> None:
        pass

    def models(self, module) -> set[str]:
        return set()

    def due(self, step: int, done: bool) -> bool:
        return False


class NoProfile(AbstractContextManager):
    """No trace is written."""

    def __exit__(self, *_) -> None:
        pass

    def step(self) -> None:
        pass
