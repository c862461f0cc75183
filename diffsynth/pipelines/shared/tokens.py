"""Latents as a transformer's tokens, of 2 × 2 latent pixels (`pack_latents`) or of one (`flatten_latents`)."""

import math

import torch.nn.functional as F
from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, 2h, 2w) as tokens (B, h · w, C · 4)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The first tokens of (B, L, C · 4) as latents (B, C, height, width)."""
    sides = height // 2, width // 2
    return F.pixel_shuffle(tokens[:, : math.prod(sides)].transpose(1, 2).unflatten(2, sides), 2)


def flatten_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h · w, C)."""
    return latents.flatten(2).transpose(1, 2)


def unflatten_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h · w, C) as latents (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
