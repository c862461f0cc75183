"""Everything that changes while training: one step of it, and how it is kept and taken up again."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.loss.base import MODEL
from ..diffusion.trained import TrainProgress
from .absent import NoEMA
from .ema import EMA
from .engines import Engine, choose_engine
from .meter import Meter
from .schedule import make_schedule, same_until
from .stochastic_rounding import StochasticRounding


class TrainedPart:
    """Weights that one optimizer steps: the model's, or those of a further role.

    Args:
        optimizer, lr_scheduler: See `TrainingState`.
        steps: How many steps of the run train it.
        has_masters: Whether an engine keeps fp32 weights beside these.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: Callable,
        lr_scheduler: Callable | None,
        steps: int,
        has_master_weights: bool = False,
    ):
        self.parameters = parameters
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
        self.rounding = StochasticRounding(self.all) if in_bf16 and not has_master_weights else None
        self.optimizer = optimizer(self.rounding.fp32_copies if self.rounding else self.all)
        self.schedule = make_schedule(lr_scheduler, self.optimizer, steps)

    @property
    def all(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def step(self, seed: int) -> None:
        """Step the optimizer."""
        if self.rounding:
            self.rounding.step(self.optimizer, seed=seed)
        else:
            self.optimizer.step()

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        return sum(math.prod(self.shapes[name]) * p.element_size() for name, p in self.parameters.items())

    def trees(self, engine: Engine) -> dict[str, Any]:
        """What changes, as trees of whole tensors and numbers."""
        return {
            "weights": engine.weights(self),
            "optimizer": engine.optimizer_state(self),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def restore(self, engine: Engine, tree: Callable[[str], Any]) -> None:
        weights = tree("weights")
        _check_same({name: tuple(tensor.shape) for name, tensor in weights.items()}, self.shapes)
        engine.set_weights(self, weights)
        engine.set_optimizer_state(self, tree("optimizer"))
        if self.schedule is not None:
            self.schedule.load_state_dict(tree("schedule"))


class TrainingState:
    """The trained weights, their optimizers, schedules and average, and the number of steps behind them.

    Args:
        optimizer: `optimizer(parameters)`; each trained part of the model has its own.
        lr_scheduler: `lr_scheduler(optimizer)`, stepped once an optimizer step; also given `num_training_steps` if it
            takes that; None for a constant rate.
        steps: Length of the run.
        ema: Averages the model itself, not further roles.
    """

    def __init__(
        self,
        accelerator,
        model,
        optimizer: Callable,
        lr_scheduler: Callable | None,
        steps: int,
        ema: EMA | NoEMA,
        engine: Engine | None = None,
    ):
        self.module, self.steps, self.lr_scheduler = model, steps, lr_scheduler
        self.tells_progress = "progress" in inspect.signature(model.forward).parameters
        self.engine = engine or choose_engine(accelerator)
        self.engine.shard(model)
        trained = self._steps_of_parts(steps)
        self.parts = {
            name: TrainedPart(
                named,
                _with_rate(optimizer, model.learning_rate(name)),
                lr_scheduler,
                trained[name],
                self.engine.has_master_weights,
            )
            for name, named in model.trained_parts().items()
        }
        self.accelerator, self.meter, self.ema = accelerator, Meter(accelerator, self.engine.cp_size), ema
        self.model = self.engine.prepare(model, self.parts)
        self.step = self.skipped_steps = self.skipped_in_a_row = 0
        ema.start(self.engine.local(self.main.all))

    def _steps_of_parts(self, steps: int) -> Counter:
        """How many of the first `steps` train each part."""
        return Counter(part for step in range(steps) for part in self.module.trained_at(step))

    def goes_through(self, counters: Mapping[str, Any]) -> bool:
        """Whether this run, of its own length, comes to where a kept state with these counters is."""
        step, steps = counters["step"], counters.get("steps", self.steps)
        if steps == self.steps:
            return True
        taken, then, now = (self._steps_of_parts(number) for number in (step, steps, self.steps))
        return all(same_until(self.lr_scheduler, taken[name], then[name], now[name]) for name in self.parts)

    @property
    def main(self) -> TrainedPart:
        """The model itself."""
        return next(iter(self.parts.values()))

    @property
    def learning_rate(self) -> float:
        return self.main.optimizer.param_groups[0]["lr"]

    def numbers(self) -> dict[str, float]:
        """What the meter counted since its last reading, and what the next step is taken with."""
        skipped = {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
        return {**self.meter.read(), "lr": self.learning_rate, **skipped}

    def losses(self, batch: Any) -> Tensor:
        """The losses (b,) of a micro-batch."""
        progress = {"progress": TrainProgress(self.step, self.steps)} if self.tells_progress else {}
        return self.model(batch, **progress)

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of a micro-batch's losses (b,)."""
        self.engine.backward(losses.mean())
        self.meter.add_losses(losses)

    def update(self, max_grad_norm: float | None) -> bool:
        """Take one optimizer step, or leave it out where the gradient is not finite; whether it was taken."""
        names = self.module.trained_at(self.step)
        trained = [self.parts[name] for name in names]
        norms = self.engine.step(trained, max_grad_norm or math.inf, seed=self.step)
        finite = all(map(math.isfinite, norms))
        for part in trained:
            if part.schedule is not None:
                part.schedule.step()
        for part in self.parts.values():
            for parameter in part.all:
                parameter.grad = None
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        self.left_out = () if finite else self.meter.losses
        self.meter.end_step(norms[0] if finite else None, names[0])
        if self.main in trained:
            self.ema.update(self.engine.local(self.main.all), self.step)
        return finite

    def set_mode(self, mode: str) -> None:
        """`train` or `eval`: schedule-free optimizers keep one set of weights to train on, one to look at and save."""
        for part in self.parts.values():
            switch = getattr(part.optimizer, mode, None)
            if switch is not None:
                switch()

    @contextmanager
    def using(self, weights: str) -> Iterator[None]:
        """Look at, or save, the `raw` weights or their average `ema`."""
        if weights == "raw":
            yield
            return
        with self.ema.in_place(self.engine.local(self.main.all)):
            self.engine.rewritten()
            yield
        self.engine.rewritten()

    def exporting(self) -> AbstractContextManager:
        """Inside, the first process's module has all of the trained weights."""
        return self.engine.exporting(self.module, self.parts)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """One micro-batch, the `last` of its step or not."""
        return self.engine.accumulating(self.model, last)

    @property
    def expected_bytes(self) -> int:
        """What all of it takes after a step, if the optimizers keep two fp32 numbers a weight, as Adam does."""
        weights = sum(part.nbytes for part in self.parts.values())
        numel = 2 * sum(part.numel for part in self.parts.values())
        return weights + 4 * (numel + (self.main.numel if self.ema.average else 0))

    def trees(self) -> dict[str, Any]:
        """All of it as trees of tensors and numbers; all processes call it."""
        parts = {name: part.trees(self.engine) for name, part in self.parts.items()}
        trees = {_prefixed(name, key): tree for name, part in parts.items() for key, tree in part.items()}
        return trees | {
            "ema": self._whole_average(),
            "counters": {
                "step": self.step,
                "steps": self.steps,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "meter": self.meter.state(),
            },
        }

    def _whole_average(self) -> list[Tensor]:
        pairs = zip(self.main.all, self.ema.average, strict=False)  # there may be no average
        return [self.engine.keep(self.engine.whole(parameter, average)) for parameter, average in pairs]

    @torch.no_grad()
    def restore(self, tree: Callable[[str], Any]) -> None:
        """Go on from the trees that `tree(name)` gives.

        Raises:
            ValueError: They are of another model.
        """
        for name, part in self.parts.items():
            part.restore(self.engine, lambda key, name=name: tree(_prefixed(name, key)))
        for parameter, average, kept in zip(self.main.all, self.ema.average, tree("ema") or (), strict=False):
            average.copy_(self.engine.part_of(parameter, kept))
        counters = tree("counters")
        self.step, self.skipped_steps = counters["step"], counters["skipped_steps"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.meter.restore(counters["meter"])


def _prefixed(part: str, key: str) -> str:
    return key if part == MODEL else f"{part}_{key}"


def _with_rate(optimizer: Callable, learning_rate: float | None) -> Callable:
    return optimizer if learning_rate is None else partial(optimizer, lr=learning_rate)


def _check_same(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    if found != expected:
        name = min(name for name, _ in found.items() ^ expected.items())
        raise ValueError(
            f"The checkpoint is of another model: {name} is {found.get(name)} there and {expected.get(name)} here."
        )
