"""Latents and autoencoders of a family: shapes of latents, normalisation to unit variance, tiling.

Shapes: B batch, C channels, F frames, T latent frames, h w latent size, H W size in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """The latents that a family's network reads.

    Args:
        channels: Number of channels C.
        factor: Downsampling, H / h and W / w.
        patch: Latent pixels per token, along each side.
        group: Image sides, in tokens, are multiples of this.
        time_factor: Frames per latent frame, after the first, which has a latent frame of its own; None for images.
        statistics: Scaling and shift factor of the released autoencoder; None if it has others.
    """

    channels: int
    factor: int
    patch: int = 1
    group: int = 1
    time_factor: int | None = None
    statistics: tuple[float, float] | None = None

    @property
    def multiple(self) -> int:
        """Both sides of an image, in pixels, must be multiples of this."""
        return self.factor * self.patch * self.group

    def shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """Shape of the latents of a size in pixels: (1, C, h, w) of an image, (1, C, T, h, w) of a video."""
        time = () if self.time_factor is None else (self.frames(num_frames),)
        return 1, self.channels, *time, height // self.factor, width // self.factor

    def frames(self, num_frames: int) -> int:
        """Number T of latent frames of `num_frames` frames."""
        return 1 if self.time_factor is None else 1 + -(-(num_frames - 1) // self.time_factor)

    def tokens(self, height: int, width: int, num_frames: int = 1) -> int:
        """Number of tokens of one image or video of `height` and `width` in pixels."""
        rows, columns = (side // (self.factor * self.patch) for side in (height, width))
        return rows * columns * self.frames(num_frames)

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """`height` and `width` in pixels, rounded up to `multiple`."""
        return tuple(-(-side // self.multiple) * self.multiple for side in (height, width))

    @property
    def size_names(self) -> tuple[str, ...]:
        """The inputs that `size_of` reads."""
        return ("height", "width") if self.time_factor is None else ("height", "width", "num_frames")

    def size_of(self, request: Mapping[str, Any]) -> dict[str, int]:
        """`height` and `width` of a request and, of a video, `num_frames`, each rounded up to what the latents need."""
        size = dict(zip(("height", "width"), self.fitted(request["height"], request["width"]), strict=True))
        if self.time_factor is None:
            return size
        return {**size, "num_frames": 1 + (self.frames(request["num_frames"]) - 1) * self.time_factor}


class NormalisedVAE:
    """Mixin that makes an autoencoder of diffusers encode to, and decode from, latents of zero mean and unit variance.

    It stands before the autoencoder among the base classes. Its methods fit `AutoencoderKL`; for other autoencoders,
    override `statistics`, `tile`, `distribution`, `reconstruct`, `packed` and `unpacked`.
    """

    def check(self, latents: Latents) -> None:
        """Refuse to be the autoencoder of a network that reads other latents.

        Raises:
            ValueError: The channels differ; the message has both numbers.
        """
        if self.network_channels != latents.channels:
            raise ValueError(
                f"vae makes latents of {self.network_channels} channels, but dit reads {latents.channels}: they are of "
                "different models; take the autoencoder that was released with the transformer."
            )

    @property
    def network_channels(self) -> int:
        """Channels C of the latents that the network reads."""
        return self.config.get("latent_channels", self.config.get("z_dim"))

    def encode(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Tensor:
        """Encode RGB (B, 3, H, W) in [-1, 1] to normalised latents (B, C, h, w), the means of their distributions.

        Args:
            tiled: Encode overlapping tiles of `tile_size` latent pixels, `tile_stride` apart, which takes less memory
                and may leave faint seams.
        """
        latents = self.packed(self.distribution(image, tiled, tile_size, tile_stride).mean)
        mean, std = self.statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Tensor:
        """Decode normalised latents (B, C, h, w) to RGB (B, 3, H, W) in [-1, 1]."""
        mean, std = self.statistics(latents)
        self.tile(tiled, tile_size, tile_stride)
        return self.reconstruct(self.unpacked(latents * std + mean).to(self.dtype))

    def distribution(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64) -> Any:
        """The posterior N(μ, σ²) over the autoencoder's own latents, of RGB (B, 3, H, W) in [-1, 1]."""
        self.tile(tiled, tile_size, tile_stride)
        return super().encode(image).latent_dist

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode the autoencoder's own latents to RGB (B, 3, H, W) in [-1, 1]."""
        return super().decode(latents).sample

    def packed(self, latents: Tensor) -> Tensor:
        """Convert the autoencoder's own latents to the network's shape (B, C, h, w)."""
        return latents

    def unpacked(self, latents: Tensor) -> Tensor:
        """Convert latents (B, C, h, w) to the autoencoder's own."""
        return latents

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that normalise latents (B, C, h, w); they broadcast against `like`."""
        shift, scale = self.config.shift_factor or 0.0, self.config.scaling_factor
        mean = torch.tensor(shift, dtype=like.dtype, device=like.device)
        return mean, torch.tensor(1 / scale, dtype=like.dtype, device=like.device)

    def tile(self, tiled: bool, tile_size: int, tile_stride: int) -> None:
        """Switch tiling on or off; sizes are in pixels of the autoencoder's own latents."""
        self.use_tiling = tiled
        self.tile_latent_min_size = tile_size
        self.tile_sample_min_size = tile_size * 2 ** (len(self.config.block_out_channels) - 1)
        self.tile_overlap_factor = 1 - tile_stride / tile_size


class VideoVAE(NormalisedVAE):
    """`NormalisedVAE` for an autoencoder of videos, from RGB (B, 3, F, H, W) to latents (B, C, T, h, w).

    It has statistics by channel.
    """

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = (self.config.latents_mean, self.config.latents_std)
        shape = 1, -1, *[1] * (like.dim() - 2)
        return tuple(torch.tensor(values, device=like.device, dtype=like.dtype).view(shape) for values in both)

    def tile(self, tiled: bool, tile_size: int, tile_stride: int) -> None:
        size, stride = (n * self.spatial_compression_ratio for n in (tile_size, tile_stride))
        self.enable_tiling(size, size, stride, stride)
        self.use_tiling = tiled


class SingleFrameVAE(VideoVAE):
    """`VideoVAE` that is applied to single images: from RGB (B, 3, H, W) to latents (B, C, h, w)."""

    def distribution(self, image: Tensor, *tiling) -> Any:
        """The posterior N(μ, σ²) over latents (B, C, 1, h, w) of RGB (B, 3, H, W) in [-1, 1]."""
        return super().distribution(image.unsqueeze(2), *tiling)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, 1, h, w) to RGB (B, 3, H, W) in [-1, 1]."""
        return super().reconstruct(latents)[:, :, 0]

    def packed(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0]

    def unpacked(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)
