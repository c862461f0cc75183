"""What a template returns: inputs of the base's prediction, some of which several templates may give at once."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pipeline import kv_cache
from . import lora

TEMPLATE_OUTPUTS = ("kv_cache", "lora", "extra_text_embedding")


def template_outputs_of(pipe) -> tuple[str, ...]:
    """Those of `TEMPLATE_OUTPUTS` that a pipeline's `model_fn` takes."""
    return tuple(name for name in TEMPLATE_OUTPUTS if name in inspect.signature(pipe.model_fn).parameters)


def as_inputs(pipe, cache: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A template cache as inputs of `model_fn`, checked; `source` says where it is from.

    Raises:
        ValueError: A medium is not what the base's transformer can read; names the block or layer.
    """
    network, prefix = pipe.network, pipe.lora_prefixes[pipe.in_iteration_models[0]]
    inputs = dict(cache)
    if inputs.get("kv_cache") is not None:
        kv_cache.check(inputs["kv_cache"], network, source)
    if inputs.get("lora") is not None:
        inputs["lora"] = lora.read(inputs["lora"], network, prefix, source)
        kv_cache.check_finite({f"lora of {n}": t for n, pair in inputs["lora"].items() for t in pair}, source)
    if inputs.get("extra_text_embedding") is not None:
        _check_text(inputs["extra_text_embedding"], network.config.joint_attention_dim, source)
    return inputs


def _check_text(text: Any, width: int, source: str) -> None:
    found = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
    if not isinstance(text, Tensor) or text.ndim != 3 or found[0] != 1 or found[2] != width:
        raise ValueError(f"{source}: extra_text_embedding is {found}, expected a tensor of (1, length, {width}).")
    kv_cache.check_finite({"extra_text_embedding": text}, source)


def check_names(names: Iterable[str], known: Iterable[str], source: str, taker: str) -> None:
    """Refuse what a template returns under a name that `taker` does not take."""
    known = sorted(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"nearest: {nearest[0]!r}" if nearest else f"it takes {', '.join(known)}"
            raise ValueError(f"{source} returns {name!r}, which {taker} does not take; {hint}.")


def merge_caches(
    caches: Sequence[tuple[str, int, Mapping]], prefix: str, wins: Mapping[str, int] | None = None
) -> dict:
    """Several template caches as one.

    Args:
        caches: Of each, what to call its template, the template's number, and the cache itself.
        prefix: What LoRA files call the base's transformer.
        wins: Of a name that several give and that is no medium, the number of the template whose value is taken.

    Raises:
        ValueError: Several give such a name, and nothing says which of them wins.
    """
    joined: dict[str, Callable[[list], Any]] = {
        "kv_cache": kv_cache.merge,
        "lora": lambda given: lora.merge(given, prefix),
        "extra_text_embedding": lambda given: torch.cat(given, dim=1),
    }
    merged = {}
    for name in dict.fromkeys(name for _, _, cache in caches for name in cache):
        given = {number: cache[name] for _, number, cache in caches if name in cache}
        values = [cache[name] for _, _, cache in caches if name in cache]
        if len(values) > 1 and name not in joined:
            values = [given[_winner(name, caches, wins or {})]]
        merged[name] = joined[name](values) if len(values) > 1 else values[0]
    return merged


def _winner(name: str, caches: Sequence[tuple[str, int, Mapping]], wins: Mapping[str, int]) -> int:
    givers = {number: source for source, number, cache in caches if name in cache}
    if wins.get(name) not in givers:
        said = f"wins={{{name!r}: {wins[name]}}} is neither" if name in wins else "nothing says which of them wins"
        raise ValueError(
            f"{' and '.join(givers.values())} both return {name!r}, and {said}; say whose is taken with "
            f"wins={{{name!r}: {min(givers)}}}."
        )
    return wins[name]


def append_text(text: Tensor, mask: Tensor | None, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, L, D), padded on the right where their mask (B, L) is False, `extra` (B, L', D) before that."""
    if extra is None:
        return text, mask
    extra = extra.to(text).expand(len(text), -1, -1)
    text = torch.cat([text, extra], dim=1)
    if mask is None:
        return text, None
    mask = torch.cat([mask, mask.new_ones(extra.shape[:2])], dim=1)
    order = mask.logical_not().int().argsort(dim=1, stable=True)  # padding goes to the end
    return text.gather(1, order.unsqueeze(2).expand_as(text)), mask.gather(1, order)
