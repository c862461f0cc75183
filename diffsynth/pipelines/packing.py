"""Latents as a transformer's tokens, 2 × 2 latent pixels each, as several families pack them."""

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
