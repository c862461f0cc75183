"""The learning rate over a run, and whether a run of another length has the same up to some step."""

import inspect
from collections.abc import Callable

import torch


def make_schedule(lr_scheduler: Callable | None, optimizer: torch.optim.Optimizer, steps: int):
    """The schedule of a run of `steps`; None for a constant rate. See `training.state.TrainingState`."""
    if lr_scheduler is None:
        return None
    takes_steps = "num_training_steps" in inspect.signature(lr_scheduler).parameters
    return lr_scheduler(optimizer, num_training_steps=steps) if takes_steps else lr_scheduler(optimizer)


def same_until(lr_scheduler: Callable | None, step: int, steps: int, other_steps: int) -> bool:
    """Whether runs of `steps` and of `other_steps` have equal learning rates up to `step`, counted from 0."""
    return lr_scheduler is None or _rates(lr_scheduler, step, steps) == _rates(lr_scheduler, step, other_steps)


def _rates(lr_scheduler: Callable, step: int, steps: int) -> list[float]:
    """The factors of the learning rate, from the schedule itself: any schedule may be configured."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, rates = make_schedule(lr_scheduler, optimizer, steps), []
    for _ in range(step + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates
