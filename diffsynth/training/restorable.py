"""Checks that a checkpoint's content is a training state of this run, before any of it is loaded.

Its checksums hold if a program other than this one wrote it, so that they say nothing about the content.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .engines.sharded import ELEMENTWISE

if TYPE_CHECKING:
    from .state import TrainedPart, TrainingState

COUNTS = ("step", "steps", "skipped_steps", "skipped_in_a_row")


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are missing, differ from what was written, or hold no state; the message names the file."""


def expect(holds: bool, what: str) -> None:
    """Check one statement about a checkpoint's content.

    Raises:
        DamagedCheckpoint: It does not hold.
    """
    if not holds:
        raise DamagedCheckpoint(f"expected {what}")


def check_counters(counters: Any) -> None:
    """Check the `counters` of a saved state: its numbers of steps, and the sums of its meter."""
    expect(isinstance(counters, dict), "counters by name")
    found = [counters[name] for name in COUNTS if name != "steps" or name in counters]  # older files have no `steps`
    expect(all(type(number) is int and number >= 0 for number in found), f"whole numbers as {', '.join(COUNTS)}")
    betas = counters.get("ema_betas", [])
    expect(isinstance(betas, list) and all(map(_is_number, betas)), "a list of numbers as ema_betas")
    measured = counters.get("measured", {})
    expect(isinstance(measured, dict) and all(map(_is_number, measured.values())), "metrics by name as measured")
    expect(isinstance(counters.get("round", {}), dict), "a round by the names of its parts")
    expect(isinstance(counters["meter"], dict), "a meter")
    for sums in counters["meter"].values():
        numbers = [*sums["loss"], sums["samples"], sums["grad_norm"], sums["steps"]]
        expect(all(map(_is_number, numbers)), "numbers in the meter")


def check_weights(weights: Any) -> None:
    """Check the weights of a trained part, except their shapes: other shapes mean another model, no damage."""
    expect(_are_floats(weights), "floating-point weights by name")


def check_schedule(schedule: Any) -> None:
    """Check the state of a learning rate schedule."""
    expect(isinstance(schedule, dict) and _is_number(schedule["last_epoch"]), "a schedule's state")


def check_optimizer(part: "TrainedPart", optimizer: Any) -> None:
    """Check an optimizer's state: its parameters, learning rates, and moments of the parameters' shapes."""
    shapes = list(part.shapes.values())
    expect(isinstance(optimizer, dict) and optimizer.keys() >= {"state", "param_groups"}, "an optimizer's state")
    groups, state = optimizer["param_groups"], optimizer["state"]
    numbers = [number for group in groups for number in group["params"]]
    expect(numbers == list(range(len(shapes))), f"an optimizer of {len(shapes)} parameters")
    for group, own in zip(groups, part.optimizer.param_groups, strict=False):
        wrong = [key for key in own.keys() & group.keys() - {"params"} if not _alike(group[key], own[key])]
        expect("lr" in group and not wrong, f"an optimizer's {', '.join(wrong) or 'lr'}")
        expect(all(0 <= beta < 1 for beta in group.get("betas", ())), "betas in [0, 1)")
    expect(isinstance(state, dict) and set(state) <= set(numbers), "an optimizer's state by parameter")
    for number, values in state.items():
        moments = [value for value in values.values() if isinstance(value, Tensor) and value.dim() > 0]
        same = all(moment.is_floating_point() and tuple(moment.shape) == shapes[number] for moment in moments)
        expect(same or type(part.optimizer).__name__ not in ELEMENTWISE, f"moments of shape {shapes[number]}")


def _alike(saved: Any, own: Any) -> bool:
    """Whether a saved option can be in the place of the optimizer's own, which may be a tensor, or None, elsewhere."""
    if isinstance(saved, list | tuple):
        return isinstance(own, list | tuple) and len(saved) == len(own) and all(map(_alike, saved, own))
    kinds = [(bool, type(None)), (int, float, Tensor), (str,)]
    return any(isinstance(saved, kind) and isinstance(own, kind) for kind in kinds)


def check_average(state: "TrainingState", average: Any) -> None:
    """Check the average of the weights: one tensor of each weight's shape, or none without an EMA."""
    shapes = list(state.main.shapes.values()) if state.ema.average else []
    expect(isinstance(average, list | tuple | None), "a list of tensors as the average")
    average = average or ()
    expect(_are_floats(dict(enumerate(average))), "an average of floating-point tensors")
    expect([tuple(each.shape) for each in average] == shapes, f"an average of {len(shapes)} tensors")


def _are_floats(tensors: Any) -> bool:
    values = tensors.values() if isinstance(tensors, dict) else [tensors]
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
