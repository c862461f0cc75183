"""The scale that an adapter's configuration states: in the file's metadata, or in the adapter_config.json beside it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.json_text import parse_object
from ...core.loader import read_metadata
from .update import GROUPS

METADATA_KEY = "lora_adapter_metadata"  # key under which diffusers reads the adapter's configuration
SAVED_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # peft's and diffusers'


@dataclass(frozen=True)
class StatedScale:
    """The scale of each layer's update, alpha / rank, or alpha / √rank with rsLoRA.

    Args:
        alpha: Of the layers that `alphas` does not name.
        alphas: By the end of a layer's name.
        rank: Of layers whose tensors have none: Kronecker products of whole matrices.
        use_rslora: Divide by the square root.
        states_all_ranks: `rank` is stated, and no layer's rank is stated apart from it.
    """

    alpha: float
    alphas: Mapping[str, float]
    rank: float
    use_rslora: bool
    states_all_ranks: bool = False

    def __call__(self, layer: str, rank: int | None) -> float:
        alpha = next((alpha for end, alpha in self.alphas.items() if f".{layer}".endswith(f".{end}")), self.alpha)
        rank = rank or self.rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def stated_scale(file: Path, prefix: str) -> StatedScale | None:
    """The scale that the configuration of an adapter file states; None if it states no alpha.

    Args:
        prefix: diffusers' name of the adapted network.

    Raises:
        ValueError: The configuration is no JSON object, is of an unknown kind, or has values that are no numbers.
    """
    config, place = _configuration(file, prefix)
    if config.get("peft_type", "LORA") not in tuple(GROUPS):
        raise ValueError(f"{place} has peft_type={config['peft_type']!r:.99}; expected one of {', '.join(GROUPS)}.")
    name = next((name for name in ("lora_alpha", "alpha") if config.get(name) is not None), None)
    if name is None:
        return None
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping):
        raise ValueError(f"{place} has alpha_pattern={alphas!r:.99}, expected alphas by layer.")
    return StatedScale(
        alpha=_number(config[name], name, place),
        alphas={_literal(end, place): _number(alpha, "alpha_pattern", place) for end, alpha in alphas.items()},
        rank=_number(config.get("r", 1), "r", place),
        use_rslora=config.get("use_rslora") is True,
        states_all_ranks="r" in config and not config.get("rank_pattern"),
    )


def _configuration(file: Path, prefix: str) -> tuple[dict[str, Any], str]:
    """An adapter's configuration, and its place for errors."""
    place = f"{file}: {METADATA_KEY}"
    if (stated := read_metadata(file, METADATA_KEY)) is not None:
        start = f"{prefix}."
        return {key.removeprefix(start): value for key, value in stated.items() if key.startswith(start)}, place
    beside = file.parent / "adapter_config.json"
    if file.name in SAVED_NAMES and beside.is_file():
        return parse_object(beside.read_text(encoding="utf-8", errors="replace"), str(beside)), str(beside)
    return {}, place


def _number(value: Any, name: str, place: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2**53:
        raise ValueError(f"{place} has {name}={str(value)[:40]!r}, expected a number above 0.")
    return float(value)


def _literal(pattern: str, place: str) -> str:
    """A layer's name from a key of `alpha_pattern`, which may be an anchored and escaped expression."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{place} has the expression {pattern[:40]!r} in alpha_pattern, expected the name of a layer.")
    return name
