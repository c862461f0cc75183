"""What a round's samples say of the training: metrics, a picture of the best and the worst, and whether they collapse.

Shapes: P prompts, G samples of each.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ...core.pictures import GRID_COLUMNS, row, stack
from ...diffusion.rewards.advantages import Advantages
from .settings import Guard
from .store import Group

if TYPE_CHECKING:
    from ..state import TrainingState

logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.5, 0.9)


def metrics_of(groups: Sequence[Group], compared: Mapping[str, Advantages]) -> dict[str, float]:
    """Mean, deviation and quantiles of each reward, and how much the samples of a prompt differ.

    Args:
        compared: Each reward's advantages.
    """
    values = {"diversity": torch.stack([diversity(group.tensors["latents"]) for group in groups]).mean().item()}
    for name, own in compared.items():
        scores = torch.stack([group.scores[name] for group in groups])
        values |= {f"reward_{name}": scores.nanmean().item(), f"reward_{name}_std": _spread(scores)}
        quantiles = torch.nanquantile(scores.flatten(), torch.tensor(QUANTILES)).tolist()
        values |= {f"reward_{name}_q{q * 100:.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        values[f"reward_{name}_constant_groups"] = (own.constant + own.single) / len(groups)
        if own.unscored:
            values[f"reward_{name}_unscored"] = float(own.unscored)
    return values


def diversity(latents: Tensor) -> Tensor:
    """The mean distance () between two of G latents (G, …), √(mean (x - x')²)."""
    flat = latents.flatten(1)
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return apart.sum() / (len(flat) * (len(flat) - 1))


def spreads(prompts: Sequence[int], groups: Sequence[Group]) -> dict[str, float]:
    """How much the rewards of a prompt's samples differ, in deviations of the whole round, by the prompt's index."""
    own = torch.zeros(len(groups))
    for name in groups[0].scores:
        scores = torch.stack([group.scores[name] for group in groups]).nan_to_num(0)
        own += scores.std(1) / scores.std().clamp_min(1e-12)
    return {str(index): value for index, value in zip(prompts, own.tolist(), strict=True)}


def _spread(scores: Tensor) -> float:
    """The mean over prompts of the standard deviation of a prompt's scores (P, G), without those that are NaN."""
    centred = scores - scores.nanmean(1, keepdim=True)
    return centred.square().nanmean(1).sqrt().nanmean().item()


def best_and_worst(pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str], total: Tensor) -> Image.Image:
    """One picture with a column per prompt, and the rows best, median and worst by advantage (P, G)."""
    shown = range(min(len(prompts), GRID_COLUMNS))
    order = total.nan_to_num(0).argsort(dim=1, descending=True)
    places = {"best": 0, "median": order.shape[1] // 2, "worst": -1}
    lines = [
        row([pictures[n][order[n, place]] for n in shown], [f"{name}: {prompts[n]}" for n in shown])
        for name, place in places.items()
    ]
    return stack(lines)


class Watch:
    """Compares each round with the first one, and stops or slows a run whose samples collapse.

    Args:
        guard: The bounds, and what to do; None only watches.
    """

    def __init__(self, guard: Guard | None):
        self.guard = guard

    def look(self, state: "TrainingState", values: Mapping[str, float]) -> None:
        """Act if metrics have crossed a bound; those of the first round become what later ones are compared with.

        A run that is to end gets `collapsed`, the reason, in `state.round`.
        """
        known = state.round.get("first", {})
        state.round["first"] = {**values, **known}
        later = {name: value for name, value in values.items() if name in known}
        reasons = [] if self.guard is None else self._crossed(known, later)
        if not reasons:
            return
        if self.guard.action == "stop":
            logger.warning("guard: the run ends at step %d: %s", state.step, "; ".join(reasons))
            state.round["collapsed"] = reasons[0]
        else:
            state.scale_rates(self.guard.factor)
            logger.warning("guard: the learning rate is multiplied by %g: %s", self.guard.factor, "; ".join(reasons))

    def _crossed(self, first: Mapping[str, float], values: Mapping[str, float]) -> list[str]:
        """The bounds that metrics have crossed, in sentences."""
        bounds = {"diversity": (lambda first: self.guard.diversity * first, f"diversity={self.guard.diversity:g}")}
        for reward, fall in (self.guard.evaluation or {}).items():
            bounds[f"evaluation_{reward}"] = (lambda first, fall=fall: first - fall), f"evaluation.{reward}={fall:g}"
        reasons = []
        for name, (bound, setting) in bounds.items():
            if name in values and values[name] < (least := bound(first[name])):
                fell = f"{name} fell from {first[name]:.3g} to {values[name]:.3g}"
                reasons.append(f"{fell}, below {least:.3g} (guard.{setting})")
        return reasons
