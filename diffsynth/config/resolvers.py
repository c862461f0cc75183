"""What interpolations of the configuration may call beside OmegaConf's own."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf


def case(key: str, table: Mapping[str, Any], otherwise: Any) -> Any:
    """`${case:${model},{emoji:emoji},example}`: what the table has for a key, else the last argument."""
    return table.get(key, otherwise)


OmegaConf.register_new_resolver("case", case, replace=True)
