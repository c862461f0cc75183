"""The autoencoder that FLUX.2 and ERNIE-Image share, in normalised latents.

Shapes: B batch, C channels, h w latent size.
"""

import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from ...diffusion.pipeline.vae import NormalisedVAE


class Flux2VAE(NormalisedVAE, AutoencoderKLFlux2):
    """The released autoencoder; 2 × 2 of its latents make one of the network's, normalised by its batch norm."""

    @property
    def batch_norm_eps(self) -> float:
        return self.config.batch_norm_eps

    @property
    def network_channels(self) -> int:
        return 4 * super().network_channels

    def packed(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)

    def unpacked(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 2)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        std = (self.bn.running_var + self.batch_norm_eps).sqrt()
        return tuple(statistic.to(like).view(1, -1, 1, 1) for statistic in (self.bn.running_mean, std))
