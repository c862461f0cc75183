"""KV caches: extra keys and values that blocks of a transformer attend to, besides those of their tokens.

A cache is `{block: (k, v)}`, k and v both (B, L, heads, head_dim). The attention processors of a pipeline define the
names of its blocks. The extra keys come after those of text and image; RoPE is not applied to them, so that they have
no position in the image.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

KVCache = Mapping[str, tuple[Tensor, Tensor]]


class KVCacheReader:
    """Base class of attention processors whose call has an argument `kv_cache`; it holds the name of the block."""

    def __init__(self, block: str):
        super().__init__()
        self.block = block

    def extra(self, kv_cache: KVCache | None) -> tuple[Tensor, Tensor] | None:
        """The block's extra keys and values (B or 1, L, heads, head_dim); None if there are none.

        Without a cache the block's name is not read, so that torch.compile compiles one block for all.
        """
        return kv_cache.get(self.block) if kv_cache else None


def blocks_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """(heads, head_dim) of every block that reads a `kv_cache`."""
    layers = [layer for layer in network.modules() if isinstance(getattr(layer, "processor", None), KVCacheReader)]
    return {layer.processor.block: (layer.heads, layer.inner_dim // layer.heads) for layer in layers}


def append_keys(key: Tensor, value: Tensor, extra: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Append extra keys and values (B or 1, L, heads, head_dim) to keys and values (B, S, heads, head_dim)."""
    extra_key, extra_value = (tensor.to(key).expand(len(key), -1, -1, -1) for tensor in extra)
    return torch.cat([key, extra_key], dim=1), torch.cat([value, extra_value], dim=1)


def extend_mask(mask: Tensor, count: int) -> Tensor:
    """Extend an attention mask by `count` keys that are attended to: (B, L) to (B, 1, 1, L + count).

    One that differs between queries, (B, S, L), becomes (B, 1, S, L + count).
    """
    extended = F.pad(mask, (0, count), value=True)
    return extended[:, None] if mask.ndim == 3 else extended[:, None, None]


def merge(caches: Sequence[KVCache]) -> dict[str, tuple[Tensor, Tensor]]:
    """Concatenate the keys and values of several caches, block by block."""
    blocks = dict.fromkeys(block for cache in caches for block in cache)
    pairs = {block: [cache[block] for cache in caches if block in cache] for block in blocks}
    return {block: tuple(torch.cat(side, dim=1) for side in zip(*of, strict=True)) for block, of in pairs.items()}


def check(kv_cache: Any, network: nn.Module, source: str) -> None:
    """Refuse a `kv_cache` that `network` cannot attend to; `source` names its origin in the error.

    Raises:
        ValueError: It is no dict of pairs of tensors, the network has no such block, a shape is not the block's, or a
            value is not finite.
    """
    if not isinstance(kv_cache, Mapping):
        raise ValueError(f"{source}: kv_cache is a {type(kv_cache).__name__}, expected a dict {{block: (k, v)}}.")
    blocks = blocks_of(network)
    for block, pair in kv_cache.items():
        if block not in blocks:
            raise ValueError(f"{source}: kv_cache has {block!r}, {unknown_block(block, blocks, network)}")
        _check_pair(pair, blocks[block], f"{source}: kv_cache[{block!r}]")
    pairs = {f"kv_cache[{block!r}]": zip("kv", pair, strict=True) for block, pair in kv_cache.items()}
    check_finite({f"{name} {side}": tensor for name, pair in pairs.items() for side, tensor in pair}, source)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors with NaN or infinite values; tensors on one device cost one synchronisation together.

    Those of a plan have no values.
    """
    tensors = {name: each for name, each in tensors.items() if not (each.is_meta or isinstance(each, FakeTensor))}
    if not tensors:
        return
    are_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    for name, is_finite in zip(tensors, are_finite, strict=True):
        if not is_finite:
            raise ValueError(f"{source}: {name} holds NaN or infinite values; expected finite ones.")


def unknown_block(block: str, blocks: Mapping[str, Any], network: nn.Module) -> str:
    """The end of an error about a block that `network` does not have; `blocks` are those that it has."""
    if not blocks:
        return f"but no block of {type(network).__name__} reads a kv_cache."
    nearest = difflib.get_close_matches(block, blocks, 1)
    known = f"nearest: {nearest[0]!r}" if nearest else f"expected some of {', '.join(blocks)}"
    return f"which is no block of {type(network).__name__}; {known}."


def _check_pair(pair: Any, expected: tuple[int, int], what: str) -> None:
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        raise ValueError(f"{what} is a {type(pair).__name__}, expected a pair (k, v) of tensors.")
    shapes = [tuple(tensor.shape) for tensor in pair]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][2:] != expected:
        raise ValueError(
            f"{what} has k {shapes[0]} and v {shapes[1]}; expected two of (batch, length, {expected[0]}, "
            f"{expected[1]}), that is (batch, length, heads, head_dim)."
        )
