"""Calls rewards on pictures, and checks what they return."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...diffusion.rewards import Reward

logger = logging.getLogger(__name__)


def score(
    rewards: Mapping[str, Reward],
    pictures: Sequence[Image.Image],
    rows: Sequence[Mapping[str, Any]],
    members: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scores (N,), fp32 on the CPU, of N pictures by each reward; NaN for one that cannot be scored.

    Args:
        rows: The rows (N) of the prompts' table.
        members: As many pictures that follow one another are of one prompt; a reward that compares gets these alone.

    Raises:
        ValueError: A reward returns another number of scores; names it.
    """
    prompts, scores = [row["prompt"] for row in rows], {}
    for name, reward in rewards.items():
        values = torch.as_tensor(reward.score(pictures, prompts, rows, device), dtype=torch.float32, device="cpu")
        if values.shape != (len(pictures),):
            raise ValueError(
                f"reward.{name} returned scores of the shape {tuple(values.shape)} for {len(pictures)} pictures; "
                "expected one score a picture."
            )
        scores[name] = torch.where(values.isfinite(), values, torch.nan)
        if unscored := int(scores[name].isnan().sum()):
            logger.warning(
                "reward.%s could not score %d of %d pictures of %r.", name, unscored, len(values), prompts[0]
            )
    return scores
