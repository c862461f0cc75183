"""`JointAttention`: attention with extra keys and values, and over tokens that are split across devices; rotations.

Shapes: B batch, S tokens of text and image, L text tokens, D width.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ...core.context_parallel import TokenSplit
from .kv_cache import KVCacheReader, append_keys, extend_mask


class JointAttention(KVCacheReader):
    """Base class of the attention processors of text and image tokens together.

    A family's processor computes queries, keys and values, and calls `attend`. See `kv_cache` for the extra keys and
    values, and `core.context_parallel` for split tokens.
    """

    def attend_both(
        self,
        attn: nn.Module,
        image: Tensor,
        text: Tensor,
        rotate: Callable[[Tensor], Tensor],
        mask: Tensor | None,
        extra: tuple[Tensor, Tensor] | None,
        split: TokenSplit | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention output of the image's tokens (B, S - L, D) and of the text's (B, L, D), each with its own layers.

        Args:
            attn: The block's attention, with diffusers' names of the layers.
            image, text: The tokens, shaped like the output.
            rotate: Applies the rotary position embedding to queries or keys (B, S, heads, head_dim), the text's first.
            mask, extra, split: See `attend`.
        """
        of_text = [layer(text) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        of_image = [layer(image) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        streams = (
            split_heads(of_text, attn.heads, attn.norm_added_q, attn.norm_added_k),
            split_heads(of_image, attn.heads, attn.norm_q, attn.norm_k),
        )
        query, key, value = (torch.cat(both, dim=1) for both in zip(*streams, strict=True))
        tokens = self.attend((rotate(query), rotate(key), value), mask, extra, split)
        text, image = tokens.tensor_split([text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

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


def split_heads(projected: Sequence[Tensor], heads: int, norm_q: nn.Module, norm_k: nn.Module) -> list[Tensor]:
    """Split query, key and value (B, L, D) into heads (B, L, heads, head_dim); query and key are normalised."""
    query, key, value = (tokens.unflatten(-1, (heads, -1)) for tokens in projected)
    return [norm_q(query), norm_k(key), value]


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
