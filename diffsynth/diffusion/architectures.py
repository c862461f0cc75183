"""The configurations of released networks, for weights that have no config.json of the library's beside them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..core.loader import ModelConfig, read_shapes
from .pipeline.components import Network

FOLDER = Path(__file__).parents[1] / "plan" / "architectures"
# Endings of the names of repositories in diffusers' layout, whose names are else those of the authors' repositories.
ENDINGS = ("", "-Diffusers", "-diffusers")


@cache
def architectures() -> dict[str, dict[str, Mapping]]:
    """The configurations of released networks, by repository and by diffusers' name of the network."""
    families = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    return {repository: family["components"] for family in families for repository in family["repositories"]}


def released_config(name: str, parts: Iterable[ModelConfig]) -> Mapping[str, Any] | None:
    """The configuration of a network of the first of some repositories that is known; None if none is.

    Args:
        name: diffusers' name of the network, such as `transformer`.
        parts: Where the network is, then the others of its model: a file without a repository is of theirs.
    """
    repositories = [f"{part.model_id}{ending}" for part in parts if part.model_id for ending in ENDINGS]
    known = (architectures().get(repository, {}).get(name) for repository in repositories)
    return next(filter(None, known), None)


def config_of(
    networks: Mapping[str, tuple[Network, str]],
    part: ModelConfig,
    files: Sequence[Path] | None,
    others: Iterable[ModelConfig],
) -> str | Mapping[str, Any] | None:
    """The config.json to build a network of; None takes that beside its weights.

    The layout of the authors has no config.json of the library's. The configuration is then that of the repository that
    `part.config` names, else of the released network that `released_config` finds.

    Args:
        networks: The networks that it may be, and diffusers' name of each.
        others: Where the networks of its model are.

    Raises:
        ValueError: Its configuration is not known.
    """
    if files is None or (part.config is not None and part.config not in architectures()):
        return part.config
    network, name = next(filter(lambda each: _is_in_layout_of(each[0], files), networks.values()), (None, None))
    if len(networks) == 1 and part.config is not None:
        ((network, name),) = networks.values()
    if network is None:
        return part.config
    if part.config is not None:
        return architectures()[part.config].get(name, part.config)
    config = released_config(name, [part, *others])
    if config is None:
        raise ValueError(
            f"{files[0]} has its authors' names of tensors, without a config.json of a library's; set config= to the "
            f"repository in diffusers' layout of its model, such as {' or '.join(_having(network, name))}."
        )
    return config


def _is_in_layout_of(network: Network, files: Sequence[Path]) -> bool:
    """Whether weights are a network's, in the layout of its authors."""
    keys = [key for file in files for key in read_shapes(file)] if network.layouts else []
    return any(layout.holds(keys) for layout in network.layouts)


def _having(network: Network, name: str) -> list[str]:
    """The known repositories that have a network of a class."""
    return [
        repository for repository, components in architectures().items() if names(components.get(name, {}), network)
    ]


def names(config: Mapping[str, Any], network: Network) -> bool:
    """Whether a config.json names a class that a network may have."""
    return bool({config.get("_class_name"), *(config.get("architectures") or ())} & {*network.names})
