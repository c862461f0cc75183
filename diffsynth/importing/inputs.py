"""Which inputs a model's pipeline has, to say which of DiffSynth-Studio's it lacks; it imports torch."""

from collections.abc import Iterable

from ..diffusion.pipeline.request import defaults_of
from ..diffusion.pipeline.units import optional_inputs
from .lines import Refused
from .models import Model


def unknown_inputs(model: Model, names: Iterable[str]) -> dict[str, Refused]:
    """The names that are no input of a model's pipeline, with what to say of each."""
    pipeline = model.pipeline
    known = {*defaults_of(pipeline.request), *optional_inputs(unit() for unit in pipeline.unit_classes)}
    if "controlnet" not in model.components:
        known = {name for name in known if not name.startswith("controlnet")}
    return {name: Refused(_lacks(model, name)) for name in names if name not in known}


def _lacks(model: Model, name: str) -> str:
    return f"{model.name} has no input {name} yet; leave it out to train without it, or write a unit that reads it"
