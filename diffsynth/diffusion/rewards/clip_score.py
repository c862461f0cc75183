"""`ClipScore`: how well pictures fit their prompts, by CLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Pictures
from .clip import ClipReward


class ClipScore(ClipReward):
    """CLIP score: 100 cos(picture, prompt), the cosine of CLIP's embeddings; usually 20 to 35.

    Hessel et al. 2021 (https://arxiv.org/abs/2104.08718). As a metric, negative ones count as 0, as they have it; as a
    reward they do not, for their gradients' sake. Prompts are cut at CLIP's 77 tokens.
    """

    def score_prepared(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.cosines(inputs, prompts)

    def measure(
        self, images: Pictures, prompts: Sequence[str], targets: Pictures | None, device: torch.device
    ) -> float:
        return self.score(images, prompts, [{}] * len(images), device).clamp(min=0).mean().item()
