"""Training the autoencoder itself: reconstruction with a small pull of the latents towards the unit Gaussian.

Kingma & Welling 2013, "Auto-Encoding Variational Bayes" (https://arxiv.org/abs/1312.6114).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from .base import Objective


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss(Objective):
    """mean |x - x̂| + mean (x - x̂)² + kl_weight · mean KL(N(μ, s²) ‖ N(0, 1)), x̂ decoded from the mean μ.

    Args:
        kl_weight: Keeps latents near unit size.
    """

    kl_weight: float = 1e-4

    default_model = "vae"
    calls_model_fn = False

    def __call__(self, pipe, rng=None, **inputs) -> Tensor:
        """Loss per sample (B,) of `input_image`, B images of one size."""
        return self.loss(pipe, inputs["input_image"])

    def loss(self, pipe, input_image: Sequence[Image]) -> Tensor:
        pixels = torch.cat([pipe.media.preprocess(image, pipe.device, pipe.torch_dtype) for image in input_image]).to(
            pipe.vae.dtype
        )
        posterior = pipe.vae.distribution(pixels)
        error = pixels - pipe.vae.reconstruct(posterior.mean)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
        return (error.abs() + error**2).flatten(1).mean(1) + self.kl_weight * kl.flatten(1).mean(1)
