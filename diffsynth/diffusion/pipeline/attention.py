"""`JointAttention`: attention with extra keys and values, and over tokens that are split across devices; rotations.

Shapes: B batch, S tokens of text and image, L text tokens, D width.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...core.context_parallel import TokenSplit
from .kv_cache import KVCacheReader, append_keys, extend_mask


class JointAttention(KVCacheReader):
    """Base class of the attention processors of text and image tokens together.

    A family's processor computes queries, keys and values, and calls `attend`. See `kv_cache` for the extra keys and
    values, and `core.context_parallel` for split tokens.
    """

    def attend(
        self,
        heads: Sequence[Tensor],
        mask: Tensor | None,
        extra: tuple[Tensor, Tensor] | None,
        split: TokenSplit | None,
    ) -> Tensor:
        """Attention output (B, S, D); each token attends to all tokens of its sample.

        Args:
            heads: Query, key and value (B, S, heads, head_dim) of the text's tokens, then of the image's; with a
                `split`, of this device's tokens.
            mask: Text tokens that are attended to, of all devices (B, L), or tokens that each token attends to
                (B, S, S); None for all.
            extra: Extra keys and values (B or 1, L', heads, head_dim), which are attended to as well.
            split: How the tokens are split across devices; None for one device.
        """
        if split is not None:
            if mask is not None and mask.ndim == 3:
                raise ValueError("Regional attention masks need all tokens, but cp_size splits them; set cp_size=1.")
            heads = split.to_heads(torch.cat(heads)).chunk(3)  # one exchange of all three
            mask = mask if mask is None else split.mask(mask)
            extra = extra and tuple(split.own_heads(tensor) for tensor in extra)
        query, key, value = heads
        if extra is not None:
            key, value = append_keys(key, value, extra)
        if mask is not None:
            mask = extend_mask(mask, key.shape[1] - mask.shape[-1])
        tokens = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        tokens = tokens if split is None else split.to_tokens(tokens)
        return tokens.flatten(2).to(query.dtype)


def rotation_table(frequencies: Tensor) -> Tensor:
    """Real factors (2, …, head_dim) of `rotated` for complex frequencies (…, head_dim / 2), one per pair of values."""
    cos, sin = torch.view_as_real(frequencies).unbind(-1)
    return torch.stack([torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)]).flatten(-2)


def rotated(heads: Tensor, table: Tensor) -> Tensor:
    """Apply the rotary position embedding to queries or keys (B, S, heads, head_dim), in fp32.

    Args:
        table: Factors (2, S, head_dim) of each value and of the other one of its pair: (a, b) becomes
            (a cos - b sin, b cos + a sin). Samples with positions of their own have (2, B, S, head_dim).
    """
    own, other = table.unsqueeze(-2)
    values = heads.float()
    swapped = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (values * own + swapped * other).to(heads.dtype)
