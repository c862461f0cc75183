"""How weights are to be drawn, kept with them: an export has it in its metadata, a merged model in its config.json.

It is arguments of the pipeline, such as a distilled student's number of steps.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

METADATA_KEY = "diffsynth"  # JSON of what an export is and where it comes from
CONFIG_KEY = "_sampling"  # diffusers keeps what starts with an underscore, and asks nothing


def of_file(path: str | Path) -> dict[str, Any] | None:
    """What a safetensors file says; None if it says nothing."""
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get(METADATA_KEY)
    return _read(json.loads(about).get("sampling")) if about else None


def of_model(network: nn.Module, files: Sequence[Path]) -> dict[str, Any] | None:
    """What the files of a network say, else its config.json."""
    said = next(filter(None, map(of_file, files)), None)
    return said or _read(getattr(network.config, CONFIG_KEY, None))


def keep(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Have the config.json that a network is saved with say it."""
    network.register_to_config(**{CONFIG_KEY: dict(settings)})


def agreed(by_file: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What files say of these arguments together.

    Raises:
        ValueError: Two of them say different things.
    """
    if not by_file:
        return {}
    (first, settings), *others = by_file.items()
    for other, its in others:
        differing = [name for name in names if its.get(name) != settings.get(name)]
        if differing:
            a, b = (", ".join(f"{name}={said.get(name)}" for name in differing) for said in (settings, its))
            raise ValueError(
                f"{first} is to be drawn with {a}, {other} with {b}; load one of the two, or say what to take: set "
                f"{' and '.join(f'options.{name}' for name in differing)}."
            )
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _read(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings as they are named now: `renoise` was a switch once, and is a sampler."""
    if settings is None or "renoise" not in settings:
        return None if settings is None else dict(settings)
    others = {name: value for name, value in settings.items() if name != "renoise"}
    return {"sampler": "renoise" if settings["renoise"] else "euler", **others}
