"""Sampling settings that are stored with weights: in the metadata of an export, in the config.json of a merged model.

They are arguments of the pipeline's call that the weights were trained for, such as a distilled student's number of
steps.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...core.loader import read_metadata

METADATA_KEY = "diffsynth"  # its value is JSON about an export: base model, configuration, sampling settings
CONFIG_KEY = "_sampling"  # diffusers keeps keys that begin with an underscore and does not check them


def of_file(path: str | Path) -> dict[str, Any] | None:
    """The sampling settings in the metadata of a safetensors file; None if it has none.

    Raises:
        ValueError: The metadata is no JSON object, or its settings are none.
    """
    settings = (read_metadata(path, METADATA_KEY) or {}).get("sampling")
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"{path}: {METADATA_KEY} has sampling={str(settings)[:40]}, expected settings by name.")
    return _with_current_names(settings)


def of_model(network: nn.Module, files: Sequence[Path]) -> dict[str, Any] | None:
    """The sampling settings of a network, from the metadata of its files or else from its config.json."""
    in_metadata = next(filter(None, map(of_file, files)), None)
    return in_metadata or _with_current_names(getattr(network.config, CONFIG_KEY, None))


def keep(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Add sampling settings to the config.json that a network is saved with."""
    network.register_to_config(**{CONFIG_KEY: dict(settings)})


def agreed(by_file: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The settings `names`, on which several files must agree.

    Raises:
        ValueError: Two files differ in one of them.
    """
    if not by_file:
        return {}
    (first, settings), *others = by_file.items()
    for other, its in others:
        differing = [name for name in names if its.get(name) != settings.get(name)]
        if differing:
            a, b = (", ".join(f"{name}={values.get(name)}" for name in differing) for values in (settings, its))
            raise ValueError(
                f"{first} was trained to be sampled with {a}, {other} with {b}: use one of the two, or set "
                f"{' and '.join(f'options.{name}=…' for name in differing)} in generate.py."
            )
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _with_current_names(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings under their current names: older files have a switch `renoise`, which is now a sampler."""
    if settings is None or "renoise" not in settings:
        return None if settings is None else dict(settings)
    others = {name: value for name, value in settings.items() if name != "renoise"}
    return {"sampler": "renoise" if settings["renoise"] else "euler", **others}
