"""What families' autoencoders add to the library's: latents of unit variance, and tiles at a request's size.

Shapes: B batch, C channels, h w latent size, H W size in pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """The latents that a family's network sees.

    Args:
        channels: Channels of a latent pixel.
        factor: Pixels along each side of a latent pixel.
        patch: Latent pixels along each side of a token of the network.
    """

    channels: int
    factor: int
    patch: int = 1

    @property
    def multiple(self) -> int:
        """Both sides of an image are multiples of so many pixels."""
        return self.factor * self.patch

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (1, C, h, w) of the latents of one image of `height` and `width` in pixels."""
        return 1, self.channels, height // self.factor, width // self.factor

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one image of `height` and `width` in pixels."""
        return (height // self.multiple) * (width // self.multiple)

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """A size in pixels, rounded up to one that there are latents of."""
        return tuple(-(-side // self.multiple) * self.multiple for side in (height, width))


class NormalisedVAE:
    """Mixed in front of an autoencoder of diffusers: encodes to normalised latents and decodes them.

    What is here fits `AutoencoderKL`; others override `statistics`, `tile`, `distribution` and `reconstruct`.
    """

    def encode(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Tensor:
        """Mean latents (B, C, h, w), of zero mean and unit variance, of RGB (B, 3, H, W) in [-1, 1].

        Args:
            tiled: Encode overlapping tiles of `tile_size` latent pixels, `tile_stride` apart: less memory, faint seams.
        """
        latents = self.packed(self.distribution(image, tiled, tile_size, tile_stride).mean)
        mean, std = self.statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Tensor:
        """RGB (B, 3, H, W) in [-1, 1] of normalised latents (B, C, h, w)."""
        mean, std = self.statistics(latents)
        self.tile(tiled, tile_size, tile_stride)
        return self.reconstruct(self.unpacked(latents * std + mean).to(self.dtype))

    def distribution(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Any:
        """The posterior N(μ, σ²) over the autoencoder's own latents, of RGB (B, 3, H, W) in [-1, 1]."""
        self.tile(tiled, tile_size, tile_stride)
        return super().encode(image).latent_dist

    def reconstruct(self, latents: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [-1, 1] of the autoencoder's own latents."""
        return super().decode(latents).sample

    def packed(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents as (B, C, h, w)."""
        return latents

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder's own."""
        return latents

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, which latents (B, C, h, w) are normalised by; each broadcasts against them."""
        shift, scale = self.config.shift_factor or 0.0, self.config.scaling_factor
        return torch.tensor(shift, dtype=like.dtype, device=like.device), torch.tensor(1 / scale, dtype=like.dtype).to(
            like
        )

    def tile(self, tiled: bool, tile_size: int, tile_stride: int) -> None:
        """Encode and decode in tiles, or not; sizes in pixels of the autoencoder's own latents."""
        self.use_tiling = tiled
        self.tile_latent_min_size = tile_size
        self.tile_sample_min_size = tile_size * 2 ** (len(self.config.block_out_channels) - 1)
        self.tile_overlap_factor = 1 - tile_stride / tile_size
