"""Resolvers: functions that YAML files call as `${name:…}`, besides those of OmegaConf."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf


def case(key: str, table: Mapping[str, Any], otherwise: Any) -> Any:
    """`${case:${model},{emoji*:emoji},example}`: the value of the first pattern that a key fits, else the last one."""
    return next((value for pattern, value in table.items() if fnmatchcase(key, pattern)), otherwise)


def lora_or_full(for_lora: Any, for_full: Any, _root_: DictConfig) -> Any:
    """`${lora_or_full:1e-4,1e-5}`: return the first if the run trains an adapter or a template, else the second."""
    return for_lora if _root_.get("lora") or _root_.get("template") else for_full


OmegaConf.register_new_resolver("case", case, replace=True)
OmegaConf.register_new_resolver("lora_or_full", lora_or_full, replace=True)
