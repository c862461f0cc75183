"""Advantages: how much better each of the pictures of a prompt scored than the others of its group.

Shapes: P groups, one for each prompt of a round; G samples of a group. A score that is NaN is of a sample that could
not be scored.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...core.ranges import PositiveFloat, check_arguments

EPSILON = 1e-4  # added to the standard deviation, as DiffusionNFT and Flow-GRPO do

Std = Literal["group", "round", "none"]


class Advantages(NamedTuple):
    """Advantages (P, G), fp32, and how many of them are 0 because nothing can be compared.

    Args:
        unscored: Samples whose score is NaN.
        single: Groups with one scored sample.
        constant: Groups whose scored samples, at least two, have equal scores.
    """

    values: Tensor
    unscored: int = 0
    single: int = 0
    constant: int = 0


def advantages(scores: Tensor, std: Std = "group", name: str = "the reward") -> Advantages:
    """Advantages (R - mean) / (std + 1e-4) of scores (P, G); the mean is always that of the group.

    A sample without a score has the advantage 0, and no part in mean and deviation. So do groups with fewer than two
    scored samples, and those whose scores are equal.

    Args:
        std: Whose standard deviation divides: that of each `group`, that of all scores of the `round`, or `none`. The
            first gives each prompt the same influence, but inflates small differences, such as a judge's noise; with
            the second, prompts with a wide spread have more influence.
        name: Name of the reward, for the error message.

    Raises:
        ValueError: No sample has a score.
    """
    check_arguments(advantages, "", std=std)
    scored = scores.isfinite()
    if not scored.any():
        raise ValueError(
            f"{name} has scored none of the {scores.numel()} pictures of a round; expected a score for some of them: "
            "see its warnings in the log."
        )
    scores = scores.double()
    counts = scored.sum(1, keepdim=True)
    spread = _filled(scores, scored, -math.inf).amax(1, True) - _filled(scores, scored, math.inf).amin(1, True)
    constant, single = (counts > 1) & (spread == 0), counts == 1
    centred = _filled(scores - _mean(scores, scored, dim=1), scored & ~constant & ~single, 0)
    values = centred / _deviation(scores, scored, std)
    unscored = scored.numel() - scored.sum()
    return Advantages(values.float(), *(int(count.sum()) for count in (unscored, single, constant)))


def combined(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], std: Std = "group", maximum: PositiveFloat | None = None
) -> tuple[Tensor, dict[str, Advantages]]:
    """The weighted sum (P, G) of the advantages of several rewards, and those of each by its name.

    Each reward is normalised on its own, so that its scale does not count (GDPO, https://arxiv.org/abs/2601.05242).

    Args:
        scores: Scores (P, G) by the reward's name.
        weights: Factor of each reward.
        maximum: Clips the sum to ± this; None leaves it.

    Raises:
        ValueError: A reward has scored no sample; names it.
    """
    check_arguments(combined, "", maximum=maximum)
    each = {name: advantages(values, std, name) for name, values in scores.items()}
    total = sum(weights[name] * own.values for name, own in each.items())
    return (total if maximum is None else total.clamp(-maximum, maximum)), each


def _filled(values: Tensor, where: Tensor, other: float) -> Tensor:
    """The values, and `other` in the place of those that are not `where`."""
    return torch.where(where, values, torch.full_like(values, other))


def _mean(values: Tensor, where: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The mean of the values `where`; 0 of none."""
    return _filled(values, where, 0).sum(dim, keepdim=True) / where.sum(dim, keepdim=True).clamp(min=1)


def _deviation(scores: Tensor, scored: Tensor, std: Std) -> Tensor | float:
    """What divides the centred scores; the standard deviation is that of a population, with N in its denominator."""
    if std == "none":
        return 1.0
    dim = 1 if std == "group" else (0, 1)
    centred = scores - _mean(scores, scored, dim)
    return _mean(centred.square(), scored, dim).sqrt() + EPSILON
