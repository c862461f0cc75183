"""Make a learning rate schedule, and tell whether two runs of different lengths have equal rates up to a step."""

import inspect
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


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


def warn_of_warmup(lr_scheduler: Callable | None, optimizer: Callable, steps: int) -> None:
    """Log a warning if the learning rate of a run of `steps` optimizer steps never reaches its full value."""
    keys = {"lr_scheduler.num_warmup_steps": lr_scheduler, "optimizer.warmup_steps": optimizer}
    for key, part in keys.items():
        warmup = getattr(part, "keywords", {}).get(key.partition(".")[2], 0)
        if warmup >= steps:
            message = "%s=%d, but the run has %d steps: the learning rate never reaches its full value; set %s=%d."
            logger.warning(message, key, warmup, steps, key, steps // 10)


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
