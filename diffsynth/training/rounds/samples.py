"""`RoundSamples`, the data set of a reward training: what the policy sampled in the current round."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.data import CachedDataset, Row, TrainingData
from ...core.data.order.buckets import Size
from ...core.data.order.mixing import WeightedRows
from ...core.data.scan import SkippedRow
from ...core.input_files import InputFile
from ...diffusion.pipeline.vae import Latents
from .store import Group

if TYPE_CHECKING:
    from ...diffusion.loss.reward import RewardObjective


class RoundSamples(TrainingData):
    """The samples of a round, which `show` sets, as rows with their latents and advantages.

    Between rounds, and when memory is planned, rows have the latents' shape and no content.

    Args:
        prompts: A cache of encoded prompts.
        groups: Prompts per round.
        members: Samples per prompt.
        levels: How often a round trains each sample, each time at another noise level.
        task: The objective.
        latents: The latents of the model's family.
    """

    has_images = False
    needs_encoders = False

    def __init__(
        self,
        prompts: CachedDataset,
        groups: int,
        members: int,
        levels: int,
        task: "RewardObjective",
        latents: Latents,
    ):
        self.prompts, self.members, self.task, self.latents = prompts, members, task, latents
        self.size, self.repeat, self.metadata_path = groups * members, levels, prompts.metadata_path
        self.number: int | None = None  # of the round that is shown
        self._groups: Sequence[Group] = ()
        self._rows: Sequence[Row] = ()

    def show(self, number: int, rows: Sequence[Row], groups: Sequence[Group], advantages: Tensor) -> None:
        """Show the samples of a round: P groups of G, the prompts' rows (P), and the samples' advantages (P, G)."""
        self.number, self._rows, self._groups, self._advantages = number, rows, groups, advantages

    def __getitem__(self, index: int) -> Row:
        group, member = divmod(index, self.members)
        if self.number is None:
            return blank(self.prompts[0], self.task, self.latents, self.image_size)
        kept = {name: tensor[member : member + 1] for name, tensor in self._groups[group].tensors.items()}
        return as_sample(self._rows[group], kept, self._advantages[group, member : member + 1])

    @property
    def image_size(self) -> Size:
        """Width and height in pixels of all samples, and of clips the number of frames."""
        (size,) = self.prompts.rows_by_size()
        return size

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        return {self.image_size: [WeightedRows(range(self.size), self.repeat)]}

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        return self.prompts.scan(required)

    def fingerprint(self) -> str:
        return self.prompts.fingerprint()

    def input_files(self) -> dict[str, InputFile]:
        return self.prompts.input_files()

    def check_made_for(
        self, expected: Callable[[], Mapping[str, Any]], keys_of: Callable[..., Set[tuple[str, str]]] | None = None
    ) -> None:
        self.prompts.check_made_for(expected, keys_of)


def as_sample(prompt: Row, kept: Mapping[str, Tensor], advantage: Tensor) -> Row:
    """The row of a sample of a prompt's cached row: what is kept of it (1, …), and its advantage (1,)."""
    own = {"input_latents" if name == "latents" else name: tensor for name, tensor in kept.items()}
    return Row(prompt, {**prompt.made, "shared": {**prompt.made["shared"], **own, "advantage": advantage}})


def blank(prompt: Row, task: "RewardObjective", latents: Latents, size: Size) -> Row:
    """The row of a sample without content, of (width, height) in pixels and, for clips, frames."""
    width, height, *frames = size
    return as_sample(prompt, task.blank(latents.shape(height, width, *frames)), torch.zeros(1))
