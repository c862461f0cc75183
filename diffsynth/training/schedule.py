"""Make a learning rate schedule, and tell whether two runs of different lengths have equal rates up to a step."""

import inspect
from collections.abc import Callable

import torch


def make_schedule(
    lr_scheduler: Callable | None, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the schedule of the learning rate for a run of `steps` optimizer steps; None for a constant rate.

    Args:
        lr_scheduler: Called as `lr_scheduler(optimizer)`, with `num_training_steps` if it has such a parameter.
    """
    if lr_scheduler is None:
        return None
    takes_steps = "num_training_steps" in inspect.signature(lr_scheduler).parameters
    return lr_scheduler(optimizer, num_training_steps=steps) if takes_steps else lr_scheduler(optimizer)


def same_until(lr_scheduler: Callable | None, step: int, steps: int, other_steps: int) -> bool:
    """Whether runs of `steps` and `other_steps` steps have equal learning rates at the steps 0 to `step`."""
    return lr_scheduler is None or _rates(lr_scheduler, step, steps) == _rates(lr_scheduler, step, other_steps)


def _rates(lr_scheduler: Callable, step: int, steps: int) -> list[float]:
    """Return the factors of the learning rate at the steps 0 to `step`, by stepping a schedule of any kind."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, rates = make_schedule(lr_scheduler, optimizer, steps), []
    for _ in range(step + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates
