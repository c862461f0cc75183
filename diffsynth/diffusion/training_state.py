"""Everything that changes while training: one step of it, and how it is kept and taken up again."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .ema import EMA
from .logger import Meter
from .stochastic_rounding import StochasticRounding


class TrainingState:
    """The trained weights, their optimizer, schedule and average, and the number of steps behind them.

    Args:
        optimizer: `optimizer(parameters)`.
        lr_scheduler: `lr_scheduler(optimizer)`, stepped once an optimizer step; also given `num_training_steps` if it
            takes that; None for a constant rate.
        steps: Length of the run.
    """

    def __init__(
        self, accelerator, model, optimizer: Callable, lr_scheduler: Callable | None, steps: int, ema: EMA | None
    ):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
        self.rounding = StochasticRounding(list(parameters.values())) if in_bf16 else None
        optimizer = optimizer(self.rounding.stand_ins if self.rounding else list(parameters.values()))
        self.schedule = _schedule(lr_scheduler, optimizer, steps)
        self.accelerator, self.meter, self.ema = accelerator, Meter(accelerator), ema
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = parameters
        self.step = self.skipped_steps = self.skipped_in_a_row = 0
        if ema is not None:
            ema.start(list(parameters.values()))

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of a micro-batch's losses (b,)."""
        self.accelerator.backward(losses.mean())
        self.meter.add_losses(losses)

    def update(self, max_grad_norm: float | None) -> bool:
        """Take one optimizer step, or leave it out where the gradient is not finite; whether it was taken."""
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), max_grad_norm or math.inf))
        finite = math.isfinite(norm)
        if finite and self.rounding:
            self.rounding.step(self.optimizer.optimizer, seed=self.step)
        elif finite:
            self.optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        self.left_out = () if finite else self.meter.losses
        self.meter.end_step(norm if finite else None)
        if self.ema is not None:
            self.ema.update(list(self.parameters.values()), self.step)
        return finite

    def set_mode(self, mode: str) -> None:
        """`train` or `eval`: schedule-free optimizers keep one set of weights to train on, one to look at and save."""
        switch = getattr(self.optimizer.optimizer, mode, None)
        if switch is not None:
            switch()

    @contextmanager
    def using(self, weights: str) -> Iterator[None]:
        """Look at, or save, the `raw` weights or their average `ema`."""
        with self.ema.in_place(list(self.parameters.values())) if weights == "ema" else nullcontext():
            yield

    @property
    def expected_bytes(self) -> int:
        """What all of it takes after a step, if the optimizer keeps two fp32 numbers a weight, as Adam does."""
        fp32_numbers = 2 + (self.ema is not None)
        return sum(p.nbytes + 4 * fp32_numbers * p.numel() for p in self.parameters.values())

    def parts(self) -> dict[str, Any]:
        """All of it as trees of tensors and numbers; all processes call it."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.average,
            "counters": {
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "meter": self.meter.state(),
            },
        }

    @torch.no_grad()
    def restore(self, part: Callable[[str], Any]) -> None:
        """Go on from the trees that `part(name)` gives.

        Raises:
            ValueError: They are of another model.
        """
        weights = part("weights")
        _check_same(weights, self.parameters)
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        self.optimizer.optimizer.load_state_dict(part("optimizer"))
        if self.schedule is not None:
            self.schedule.load_state_dict(part("schedule"))
        if self.ema is not None:
            for average, kept in zip(self.ema.average, part("ema"), strict=True):
                average.copy_(kept)
        counters = part("counters")
        self.step, self.skipped_steps = counters["step"], counters["skipped_steps"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.meter.restore(counters["meter"])


def _schedule(lr_scheduler: Callable | None, optimizer, steps: int):
    if lr_scheduler is None:
        return None
    takes_steps = "num_training_steps" in inspect.signature(lr_scheduler).parameters
    return lr_scheduler(optimizer, num_training_steps=steps) if takes_steps else lr_scheduler(optimizer)


def _check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in side.items()} for side in (found, expected)]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            f"The checkpoint is of another model: {name} is {shapes[0].get(name)} there and {shapes[1].get(name)} here."
        )
