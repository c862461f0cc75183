"""Calls rewards on pictures, and checks what they return."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.unread import is_unread
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
    scores = {}
    for name, reward in rewards.items():
        size = members if reward.groupwise else len(pictures)
        parts = [slice(start, start + size) for start in range(0, len(pictures), size)]
        scores[name] = torch.cat([_score(name, reward, pictures[part], rows[part], device) for part in parts])
    return scores


def _score(
    name: str,
    reward: Reward,
    pictures: Sequence[Image.Image],
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> Tensor:
    prompts = [row["prompt"] for row in rows]
    columns = [{name: value for name, value in row.items() if not is_unread(value)} for row in rows]  # plain data
    values = torch.as_tensor(reward.score(pictures, prompts, columns, device), dtype=torch.float32, device="cpu")
    if values.shape != (len(pictures),):
        raise ValueError(
            f"reward.{name} returned scores of the shape {tuple(values.shape)} for {len(pictures)} pictures; expected "
            "one score a picture."
        )
    unscored = ~values.isfinite()
    if unscored.any():
        first = prompts[int(unscored.int().argmax())]
        logger.warning(
            "reward.%s could not score %d of %d pictures, such as one of %r.",
            name,
            int(unscored.sum()),
            len(values),
            first,
        )
    return torch.where(unscored, torch.nan, values)
