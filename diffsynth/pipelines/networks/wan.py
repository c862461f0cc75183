"""Wan's attention, which context parallelism can split over devices.

Shapes: B batch, L tokens, D width of a head.
"""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor


class SplitWanAttnProcessor(WanAttnProcessor):
    """diffusers' processor; where tokens are split over devices, self-attention exchanges them for heads.

    Cross-attention needs no exchange: each device attends from its own tokens to the whole text. The transformer passes
    no keyword arguments to its blocks, so that the split comes with the rotary tables of its own tokens.
    """

    split_comes_with_tables = True

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        split = getattr(rotary_emb, "split", None)
        if split is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in (query, key, attn.to_v(hidden_states)))
        tokens = torch.cat([turned(query, *rotary_emb), turned(key, *rotary_emb), value], dim=-1)
        heads = split.to_heads(tokens).chunk(3, dim=-1)  # one exchange for the three
        found = split.to_tokens(dispatch_attention_fn(*heads, backend=self._attention_backend))
        return attn.to_out[1](attn.to_out[0](found.flatten(2, 3).type_as(query)))


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, L, heads, D), turned pair by pair by their positions' angles (1, L, 1, D)."""
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    pairs = first * cos - second * sin, first * sin + second * cos
    return torch.stack(pairs, dim=-1).flatten(-2).type_as(heads)


def use_splittable_attention(network: WanTransformer3DModel) -> None:
    """Give all attention the processor that exchanges tokens."""
    network.set_attn_processor(SplitWanAttnProcessor())
