"""Keys and values from outside, which blocks of a transformer attend to besides their own.

`{block: (k, v)}`, both (B, L, heads, head_dim). A pipeline says in its attention processors what its blocks are called.
They stand after the tokens of text and image and behind RoPE, so that they have no place in the picture.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVCache = Mapping[str, tuple[Tensor, Tensor]]


class KVCacheReader:
    """What a processor of attention has that reads a `kv_cache`, argument of its call: the name of its block."""

    def __init__(self, block: str):
        super().__init__()
        self.block = block

    def further(self, kv_cache: KVCache | None) -> tuple[Tensor, Tensor] | None:
        """The block's entry; without a cache its name is not read, so that blocks compile as one."""
        return kv_cache.get(self.block) if kv_cache else None


def blocks_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """(heads, head_dim) of every block that reads a `kv_cache`."""
    layers = [layer for layer in network.modules() if isinstance(getattr(layer, "processor", None), KVCacheReader)]
    return {layer.processor.block: (layer.heads, layer.inner_dim // layer.heads) for layer in layers}


def appended(key: Tensor, value: Tensor, entry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, S, heads, head_dim), and after them those of an entry (B or 1, L, heads, head_dim)."""
    more = [tensor.to(key).expand(len(key), -1, -1, -1) for tensor in entry]
    return torch.cat([key, more[0]], dim=1), torch.cat([value, more[1]], dim=1)


def attending_to_all_after(mask: Tensor, count: int) -> Tensor:
    """A mask (B, L) as one (B, 1, 1, L + count) over keys, of which all further ones are attended to."""
    return F.pad(mask, (0, count), value=True)[:, None, None, :]


def merge(caches: Sequence[KVCache]) -> dict[str, tuple[Tensor, Tensor]]:
    """All keys and values of several caches, block by block one after the other."""
    blocks = dict.fromkeys(block for cache in caches for block in cache)
    entries = {block: [cache[block] for cache in caches if block in cache] for block in blocks}
    return {block: tuple(torch.cat(side, dim=1) for side in zip(*own, strict=True)) for block, own in entries.items()}


def check(kv_cache: Any, network: nn.Module, source: str) -> None:
    """Refuse what `network` cannot attend to; `source` says where it is from.

    Raises:
        ValueError: It is no dict of pairs of tensors, a block is none of the network's, shapes are others than the
            block's, or a number is not finite.
    """
    if not isinstance(kv_cache, Mapping):
        raise ValueError(f"{source}: kv_cache is a {type(kv_cache).__name__}, expected a dict {{block: (k, v)}}.")
    blocks = blocks_of(network)
    for block, entry in kv_cache.items():
        if block not in blocks:
            raise ValueError(f"{source}: kv_cache has {block!r}, {_unknown(block, blocks, network)}")
        _check_entry(entry, blocks[block], f"{source}: kv_cache[{block!r}]")
    entries = [(block, *pair) for block, pair in kv_cache.items()]
    tensors = {f"kv_cache[{block!r}] {n}": tensor for block, k, v in entries for n, tensor in {"k": k, "v": v}.items()}
    check_finite(tensors, source)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity, of tensors on one device at the price of one synchronisation."""
    tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    if not tensors:
        return
    for name, finite in zip(tensors, torch.stack([t.isfinite().all() for t in tensors.values()]).tolist(), strict=True):
        if not finite:
            raise ValueError(f"{source}: {name} holds NaN or infinite values; expected finite ones.")


def _unknown(block: str, blocks: Mapping[str, Any], network: nn.Module) -> str:
    if not blocks:
        return f"but no block of {type(network).__name__} reads a kv_cache."
    nearest = difflib.get_close_matches(block, blocks, 1)
    known = f"nearest: {nearest[0]!r}" if nearest else f"expected some of {', '.join(blocks)}"
    return f"which is no block of {type(network).__name__}; {known}."


def _check_entry(entry: Any, expected: tuple[int, int], what: str) -> None:
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(t, Tensor) for t in entry)):
        raise ValueError(f"{what} is a {type(entry).__name__}, expected a pair (k, v) of tensors.")
    shapes = [tuple(tensor.shape) for tensor in entry]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][2:] != expected:
        raise ValueError(
            f"{what} has k {shapes[0]} and v {shapes[1]}; expected two of (batch, length, {expected[0]}, "
            f"{expected[1]}), that is (batch, length, heads, head_dim)."
        )
