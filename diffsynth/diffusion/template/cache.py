"""Template caches: the dicts that templates return, which become inputs of `model_fn`; checked and merged here.

`kv_cache`, `lora`, `extra_text_embedding` and `block_residuals` can come from several templates: they are merged.
Shapes: B batch, L tokens, D width.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.names import LayerNames
from ..pipeline import kv_cache
from . import lora, residuals

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

TEMPLATE_OUTPUTS = ("kv_cache", "lora", "extra_text_embedding", "block_residuals")


def template_outputs_of(pipe: "BasePipeline") -> tuple[str, ...]:
    """The names in `TEMPLATE_OUTPUTS` that are parameters of a pipeline's `model_fn`."""
    return tuple(name for name in TEMPLATE_OUTPUTS if name in inspect.signature(pipe.model_fn).parameters)


def as_inputs(pipe: "BasePipeline", cache: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check a template cache and convert it to inputs of `model_fn`; `source` names its origin in errors.

    Raises:
        ValueError: The base's transformer cannot read an output; the message names the block or layer.
    """
    network, names = pipe.network, pipe.layer_names(pipe.in_iteration_models[0])
    inputs = dict(cache)
    if inputs.get("kv_cache") is not None:
        kv_cache.check(inputs["kv_cache"], network, source)
    if inputs.get("lora") is not None:
        inputs["lora"] = lora.read(inputs["lora"], network, names, source)
        kv_cache.check_finite({f"lora of {n}": t for n, pair in inputs["lora"].items() for t in pair}, source)
    if inputs.get("extra_text_embedding") is not None:
        _check_text(inputs["extra_text_embedding"], network.config.joint_attention_dim, source)
    if inputs.get("block_residuals") is not None:
        inputs["block_residuals"] = residuals.read(inputs["block_residuals"], network, source)
    return inputs


def _check_text(text: Any, width: int, source: str) -> None:
    found = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
    if not isinstance(text, Tensor) or text.ndim != 3 or found[0] != 1 or found[2] != width:
        raise ValueError(f"{source}: extra_text_embedding is {found}, expected a tensor of (1, length, {width}).")
    kv_cache.check_finite({"extra_text_embedding": text}, source)


def check_names(names: Iterable[str], known: Iterable[str], source: str, taker: str) -> None:
    """Refuse a template's outputs whose names are not `known` to `taker`, the function that gets them."""
    known = sorted(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"nearest: {nearest[0]!r}" if nearest else f"it takes {', '.join(known)}"
            raise ValueError(f"{source} returns {name!r}, which {taker} does not take; {hint}.")


def merge_caches(
    caches: Sequence[tuple[str, int, Mapping]],
    network: nn.Module,
    names: LayerNames,
    wins: Mapping[str, int] | None = None,
) -> dict:
    """Merge several template caches into one.

    Args:
        caches: For each cache the template's name in errors, the template's number, and the cache.
        network: The base's transformer.
        names: Its names in adapter files.
        wins: For an output that several templates return and that cannot be merged, the number of the template whose
            value is taken.

    Raises:
        ValueError: Several templates return such an output, and `wins` names none of them.
    """
    mergers: dict[str, Callable[[list], Any]] = {
        "kv_cache": kv_cache.merge,
        "lora": lambda values: lora.merge(values, network, names),
        "extra_text_embedding": lambda values: torch.cat(values, dim=1),
        "block_residuals": residuals.merge,
    }
    merged = {}
    for name in dict.fromkeys(name for _, _, cache in caches for name in cache):
        by_number = {number: cache[name] for _, number, cache in caches if name in cache}
        values = [cache[name] for _, _, cache in caches if name in cache]
        if len(values) > 1 and name not in mergers:
            values = [by_number[_winner(name, caches, wins or {})]]
        merged[name] = mergers[name](values) if len(values) > 1 else values[0]
    return merged


def _winner(name: str, caches: Sequence[tuple[str, int, Mapping]], wins: Mapping[str, int]) -> int:
    sources = {number: source for source, number, cache in caches if name in cache}
    if wins.get(name) not in sources:
        reason = f"wins={{{name!r}: {wins[name]}}} is neither" if name in wins else "wins does not name one of them"
        raise ValueError(
            f"{' and '.join(sources.values())} both return {name!r}, and {reason}; choose whose value is taken, for "
            f"example wins={{{name!r}: {min(sources)}}}."
        )
    return wins[name]


def append_text(text: Tensor, mask: Tensor | None, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Append extra text embeddings to the prompt's, before the padding; returns the embeddings and their mask.

    Args:
        text: Text embeddings (B, L, D), padded on the right.
        mask: False where `text` is padding (B, L); None if nothing is.
        extra: Extra embeddings (B or 1, L', D); None for none.
    """
    if extra is None:
        return text, mask
    extra = extra.to(text).expand(len(text), -1, -1)
    text = torch.cat([text, extra], dim=1)
    if mask is None:
        return text, None
    mask = torch.cat([mask, mask.new_ones(extra.shape[:2])], dim=1)
    order = mask.logical_not().int().argsort(dim=1, stable=True)  # moves the padding to the end
    return text.gather(1, order.unsqueeze(2).expand_as(text)), mask.gather(1, order)
