"""`HeldOut`: what rewards say of the policy's samples of prompts that are never trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

from ...core.data import CachedDataset, Row
from ...core.data.order.addresses import sample_seed
from ...core.files import going_on_without
from ...core.pictures import GRID_COLUMNS, row, save_png, stack
from ...core.sharing import share
from ...diffusion.distillation.roles import STUDENT
from ...diffusion.rewards import Reward
from .sampling import Request, decoded, plainly, sample_in_batches
from .scoring import score
from .settings import RoundSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.training_module import PipelineTrainingModule
    from ..state import TrainingState

ROWS = 2  # of pictures that an evaluation shows; a guess


class Scored(NamedTuple):
    """A sample of a held-out prompt, and its score by each reward."""

    picture: Image.Image
    scores: Mapping[str, float]


class HeldOut:
    """Samples held-out prompts, always from the same noise, and scores them.

    Args:
        prompts: A cache of encoded prompts; None evaluates nothing.
        rewards: The rewards that are trained for, by name; their metrics begin with `held_out_`.
        evaluation_rewards: Rewards that are only measured, by name; their metrics begin with `evaluation_`.
        settings: How much is sampled.
        seed: Of the samples' noise.
    """

    def __init__(
        self,
        prompts: CachedDataset | None,
        rewards: Mapping[str, Reward],
        evaluation_rewards: Mapping[str, Reward],
        settings: RoundSettings,
        seed: int,
    ):
        self.prompts, self.settings, self.seed = prompts, settings, seed
        self.rewards = {f"held_out_{name}": reward for name, reward in rewards.items()}
        self.rewards |= {f"evaluation_{name}": reward for name, reward in evaluation_rewards.items()}

    def evaluate(self, accelerator: "Accelerator", state: "TrainingState") -> tuple[dict[str, float], dict[str, Path]]:
        """Mean, standard deviation and standard error of each reward, and the picture that the first process saved.

        All processes call it.
        """
        if self.prompts is None:
            return {}, {}
        count = min(self.settings.held_out_prompts, self.prompts.size)
        rows = [self.prompts[number] for number in range(count)]
        module = accelerator.unwrap_model(state.model)
        with state.engine.evaluating():
            found = share(list(enumerate(rows)), lambda mine: self._sample(module, mine))
        values = {}
        for name in self.rewards:
            values |= _statistics(name, torch.tensor([sample.scores[name] for own in found for sample in own]))
        path = Path(self.settings.path) / f"held-out-{state.step:06d}.png"
        if accelerator.is_main_process:
            shown = min(count, ROWS * GRID_COLUMNS)
            captions = [f"{state.step}: {each['prompt']}" for each in rows[:shown]]
            with going_on_without(str(path)):
                save_png(_grid([own[0].picture for own in found[:shown]], captions), path)
        return values, {"held_out": path}

    def _sample(self, module: "PipelineTrainingModule", mine: Sequence[tuple[int, Row]]) -> list[list[Scored]]:
        """The samples of some numbered prompts, by prompt."""
        members = range(self.settings.held_out_samples)
        requests = [
            Request(prompt, sample_seed(self.seed, "held out", number, member) >> 1)
            for number, prompt in mine
            for member in members
        ]
        kept = sample_in_batches(module, requests, plainly, STUDENT, self.settings.batch_size)
        pictures = [module.pipe.media.thumbnail(result) for result in decoded(module, kept["latents"])]
        rows = [request.row for request in requests]
        scores = score(self.rewards, pictures, rows, len(members), module.pipe.device)
        each = [Scored(picture, {n: own[i].item() for n, own in scores.items()}) for i, picture in enumerate(pictures)]
        return [each[start : start + len(members)] for start in range(0, len(each), len(members))]


def _statistics(name: str, scores: torch.Tensor) -> dict[str, float]:
    """Metrics of scores (N,), without those that are NaN."""
    scored = scores[~scores.isnan()]
    spread = scored.std().item() if len(scored) > 1 else 0.0
    error = spread / max(len(scored), 1) ** 0.5
    return {name: scored.mean().item(), f"{name}_std": spread, f"{name}_error": error}


def _grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    starts = range(0, len(pictures), GRID_COLUMNS)
    lines = [slice(start, start + GRID_COLUMNS) for start in starts]
    return stack([row(pictures[line], captions[line]) for line in lines])
