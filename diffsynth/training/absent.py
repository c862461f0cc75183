"""Null objects for the optional parts of a training, so that the loop does not ask whether a part is there.

Their methods are those of `EMA`, `Checkpoints`, `LocalLogger` and `Validation`, as far as the loop calls them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from ..diffusion.training_module import DiffusionTrainingModule, PipelineTrainingModule
    from .ema import EMA
    from .state import TrainingState


class NoEMA:
    """Keeps no average of the weights."""

    weights = ("raw",)
    on_device = False
    every = 1
    average: Sequence["Tensor"] = ()
    betas: Sequence[float] = ()

    def start(self, parameters: Sequence["Tensor"]) -> None:
        pass

    def update(self, parameters: Sequence["Tensor"], step: int) -> None:
        pass


class NoCheckpoints:
    """Saves no checkpoints and resumes from none."""

    saves = False
    path = None

    def due(self, step: int) -> bool:
        return False

    def kept(self) -> str:
        return "There is no checkpoint."

    def most(self, steps: int) -> int:
        return 0

    def steps(self) -> list[int]:
        return []

    def resume(self, accelerator: "Accelerator", state: "TrainingState", identity: Mapping[str, Any]) -> bool:
        return False

    def check_room_for_run(self, size: int, steps: int) -> None:
        pass

    def save_if_due(
        self, accelerator: "Accelerator", state: "TrainingState", identity: Mapping[str, Any], last: bool
    ) -> None:
        pass


class NoLogger:
    """Writes no metrics."""

    path = None

    def check(self) -> None:
        pass

    def start(self, step: int, resumed: bool) -> None:
        pass

    def due(self, step: int, done: bool) -> bool:
        return False

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None:
        pass

    def forget(self, step: int, name: str) -> None:
        pass

    def finish(self) -> None:
        pass


class NoValidation:
    """Evaluates nothing."""

    path = None

    datasets: Mapping[str, Any] = {}
    prompts: Sequence[str] = ()
    saved: Sequence = ()
    metric_names: Sequence[str] = ()

    def check(self, ema: "EMA | NoEMA") -> None:
        pass

    def models(self, module: "DiffusionTrainingModule") -> set[str]:
        return set()

    def shown_rows(self, module: "PipelineTrainingModule") -> int:
        return 0

    def one_of_each(self, module: "PipelineTrainingModule") -> list[dict]:
        return []

    def due(self, step: int, done: bool) -> bool:
        return False


class NoRounds:
    """Samples nothing to train on: the data set has it all."""

    batch_size = None
    versions: Mapping[str, str] = {}
    all_rewards: Sequence = ()

    def has_ended(self, state: "TrainingState") -> bool:
        return False

    def begin(self, *_: object) -> bool:
        return True

    def finish(self, *_: object) -> None:
        pass


class NoDataReport:
    """Writes nothing about the data."""

    def write(self, *_: object) -> None:
        pass


class NoProfile(AbstractContextManager):
    """Writes no trace."""

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        pass
