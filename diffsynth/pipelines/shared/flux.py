"""What the networks of FLUX.1, Chroma, FLUX.2 and FLUX.3 share: rotations, and positions of tokens.

Shapes: B batch, S tokens, h w latent size.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


def rotation(frequencies: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """The rotary position embedding of queries or keys (B, S, heads, head_dim), as a function of them.

    Args:
        frequencies: Cosines and sines (S, head_dim).
    """
    return partial(apply_rotary_emb, freqs_cis=frequencies, sequence_dim=1)


def grid_positions(time: int, height: int, width: int, length: int) -> Tensor:
    """Positions (h · w · l, 4) of tokens on the four axes of RoPE: time, row, column, position in the text."""
    return torch.cartesian_prod(torch.tensor([time]), *(torch.arange(n) for n in (height, width, length)))
