"""What interpolations of the configuration may call beside OmegaConf's own."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf


def case(key: str, table: Mapping[str, Any], otherwise: Any) -> Any:
    """`${case:${model},{emoji:emoji},example}`: what the table has for a key, else the last argument."""
    return table.get(key, otherwise)


def lora_or_full(of_a_lora: Any, in_full: Any, _root_: DictConfig) -> Any:
    """`${lora_or_full:1e-4,1e-5}`: the first where an adapter or a template is trained, else the second."""
    return of_a_lora if _root_.get("lora") or _root_.get("template") else in_full


OmegaConf.register_new_resolver("case", case, replace=True)
OmegaConf.register_new_resolver("lora_or_full", lora_or_full, replace=True)
