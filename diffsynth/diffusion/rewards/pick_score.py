"""`PickScore`: which pictures people prefer for a prompt, by a CLIP that was trained on their choices."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...core.loader import ModelConfig
from ...core.ranges import BatchSize, NonZero
from .clip import ClipReward
from .network import digest_of_folder

SCALE = 26  # brings scores near 1, as Flow-GRPO and DiffusionNFT have it


class PickScore(ClipReward):
    """PickScore / 26: exp(logit scale) · cos(picture, prompt) / 26; usually 0.75 to 0.9.

    Kirstain et al. 2023 (https://arxiv.org/abs/2305.01569).

    Args:
        model: The network, a CLIP ViT-H/14.
        processor: The folder of its tokenizer and image processor, which is CLIP ViT-H/14's.
        batch_size: Pictures per forward.
    """

    def __init__(self, model: ModelConfig, processor: ModelConfig, batch_size: BatchSize = 16, weight: NonZero = 1.0):
        super().__init__(model, batch_size, weight)
        self.processor_files = processor

    @property
    def processor_folder(self) -> Path:
        first = self.processor_files.resolve()[0]
        return first if first.is_dir() else first.parent

    @cached_property
    def version(self) -> str:
        return f"{super().version} {digest_of_folder(self.processor_folder)}"

    def find(self) -> None:
        super().find()
        _ = self.processor_folder

    def score_prepared(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network.logit_scale.exp() * self.cosines(inputs, prompts) / SCALE
