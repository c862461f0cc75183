"""Training the autoencoder itself: reconstruction, and a small KL term that pulls latents to the unit Gaussian.

Kingma & Welling 2013, "Auto-Encoding Variational Bayes" (https://arxiv.org/abs/1312.6114).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.ranges import NonNegativeFloat
from ..base_pipeline import BasePipeline
from ..randomness import GlobalRNG, SampleRNG
from .base import Objective


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss(Objective):
    """mean |x - x̂| + mean (x - x̂)² + kl_weight · mean KL(N(μ, s²) ‖ N(0, 1)), x̂ decoded from the mean μ.

    Args:
        kl_weight: Weight of the KL term, which keeps latents near unit variance; 1e-4 is a guess.
    """

    kl_weight: NonNegativeFloat = 1e-4

    default_models = ("vae",)
    calls_model_fn = False

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,) of B images, or videos, of one size."""
        return self.loss(pipe, inputs[pipe.media.argument])

    def wanted_inputs(self, pipe: BasePipeline) -> set[str]:
        return {pipe.media.argument}

    def loss(self, pipe: BasePipeline, values: Sequence[Any]) -> Tensor:
        each = [pipe.media.preprocess(value, pipe.device, pipe.torch_dtype) for value in values]
        pixels = torch.cat(each).to(pipe.vae.dtype)  # (B, 3, H, W), of videos (B, 3, F, H, W)
        posterior = pipe.vae.distribution(pixels)
        error = pixels - pipe.vae.reconstruct(posterior.mean)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
        return (error.abs() + error**2).flatten(1).mean(1) + self.kl_weight * kl.flatten(1).mean(1)
