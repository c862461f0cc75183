"""What the families of FLUX share: names of layers, rotations, positions of tokens, states of a language model.

Shapes: B batch, L text tokens, S tokens, D width, h w latent size.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ...diffusion.prompts.hidden_states import hidden_states

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
QKV = tuple(f"{DOUBLE}.attn.to_{part}" for part in "qkv")
TEXT_QKV = tuple(f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv")
# Black Forest Labs' names of the layers that FLUX.1, Chroma and FLUX.2 have.
COMMON_NAMES = {
    "double_blocks.*.img_attn.qkv": QKV,
    "double_blocks.*.txt_attn.qkv": TEXT_QKV,
    "double_blocks.*.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}


def rotation(frequencies: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """The rotary position embedding of queries or keys (B, S, heads, head_dim), as a function of them.

    Args:
        frequencies: Cosines and sines (S, head_dim).
    """
    return partial(apply_rotary_emb, freqs_cis=frequencies, sequence_dim=1)


def grid_positions(time: int, height: int, width: int, length: int) -> Tensor:
    """Positions (h · w · l, 4) of tokens on the four axes of RoPE: time, row, column, position in the text."""
    return torch.cartesian_prod(torch.tensor([time]), *(torch.arange(n) for n in (height, width, length)))


def text_depths(decoder: nn.Module, count: int) -> list[int]:
    """Numbers of layers after which hidden states are read: `count` of them, which cut the layers into equal parts."""
    return [decoder.config.num_hidden_layers * number // (count + 1) for number in range(1, count + 1)]


def text_embeddings(decoder: nn.Module, count: int, **inputs: Tensor) -> Tensor:
    """Hidden states of a language model after its `text_depths`, concatenated (B, L, count · D); no later layer runs.

    Args:
        inputs: Arguments of the language model's call, such as `input_ids` (B, L).
    """
    return torch.cat(hidden_states(decoder, text_depths(decoder, count), **inputs), dim=2)


def embedding_widths(dit: nn.Module, text_encoder: nn.Module, count: int) -> tuple[int, int]:
    """Widths of the text embeddings that the network takes, and of the text encoder's `text_embeddings`."""
    return dit.config.joint_attention_dim, count * text_encoder.get_decoder().config.hidden_size
