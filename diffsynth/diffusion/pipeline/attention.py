"""What our processors of attention add to the library's: keys from outside, and tokens that lie on several devices."""

from collections.abc import Sequence

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...core.context_parallel import TokenSplit
from .kv_cache import KVCacheReader, appended, attending_to_all_after


class JointAttention(KVCacheReader):
    """A processor, of text and image together, that reads a `kv_cache` and knows how its tokens are split."""

    def attend(
        self,
        heads: Sequence[Tensor],
        mask: Tensor | None,
        further: tuple[Tensor, Tensor] | None,
        split: TokenSplit | None,
    ) -> Tensor:
        """Tokens (B, S, D) that attend to all tokens of their sample.

        Args:
            heads: Query, key and value (B, S, heads, head_dim) of the text's tokens, then the image's; with a `split`,
                of those on this device.
            mask: Which of all of the text's tokens are looked at (B, L).
            further: Keys and values (B or 1, L', heads, head_dim) that are looked at as well.
        """
        if split is not None:
            heads = [split.to_heads(each) for each in heads]
            mask = mask if mask is None else split.mask(mask)
            further = further and tuple(split.own_heads(each) for each in further)
        query, key, value = heads
        if further is not None:
            key, value = appended(key, value, further)
        if mask is not None:
            mask = attending_to_all_after(mask, key.shape[1] - mask.shape[1])
        tokens = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        tokens = tokens if split is None else split.to_tokens(tokens)
        return tokens.flatten(2).to(query.dtype)
