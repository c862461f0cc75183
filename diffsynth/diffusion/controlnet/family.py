"""`ControlFamily`: what a model family says of its ControlNets; several of them have places among its components."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..pipeline.components import Network
from .inputs import ControlInputs

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

CONTROLNET_SLOTS = "controlnet", "controlnet_2", "controlnet_3"  # components of a family with ControlNets


def same_name(name: str, _: Mapping[str, Any]) -> str:
    """The `source` of ControlNets whose copied parameters are named as those of the transformer."""
    return name


@dataclass(frozen=True, kw_only=True)
class ControlFamily:
    """The ControlNets of a model family, which `model_fn` gets as a list, `controlnets`.

    Args:
        kind: Their class.
        inputs: `inputs(controlnet)` returns what a ControlNet reads.
        check: `check(name, controlnet, transformer)` raises ValueError if they do not fit.
        prompt: Inputs of the positive prompt that the ControlNets read in both predictions of guidance: `model_fn` gets
            them as `control_prompt`, a tuple. Without any they read the prompt of each prediction.
        blocks: Number of the transformer's blocks that a new ControlNet copies by default, if there are so many.
        layers: Key of the transformer's configuration with the number of blocks that can be copied.
        config: `config(transformer's configuration, number of blocks, whether it reads a mask)` returns that of a new
            ControlNet.
        source: `source(name of a parameter, the ControlNet's configuration)` returns the name of the transformer's
            parameter that it copies. Where the transformer has none of that name and shape, the parameter stays as its
            class begins it: outputs are zero, so that the first step changes nothing.
    """

    kind: type[nn.Module]
    inputs: Callable[[Any], ControlInputs]
    check: Callable[[str, Any, Any], None]
    prompt: Sequence[str] = ()
    blocks: int
    layers: str = "num_layers"
    config: Callable[[Mapping[str, Any], int, bool], dict[str, Any]]
    source: Callable[[str, Mapping[str, Any]], str] = same_name


def places_of(family: ControlFamily | None) -> dict[str, Network]:
    """The components of a model family for its ControlNets."""
    made_by = "python controlnet.py model=… output={path}, with the model's name without _controlnet"
    return {name: Network(family.kind, optional=True, made_by=made_by) for name in CONTROLNET_SLOTS} if family else {}


def controlnets_of(pipe: "BasePipeline") -> dict[str, nn.Module]:
    """The ControlNets that a pipeline has, by their places."""
    if pipe.control_family is None:
        return {}
    found = {name: getattr(pipe, name) for name in CONTROLNET_SLOTS}
    return {name: network for name, network in found.items() if network is not None}


def check_controlnets(pipe: "BasePipeline") -> None:
    """Refuse ControlNets that do not fit a pipeline's transformer.

    Raises:
        ValueError: A ControlNet does not fit, or there is a second one without a first.
    """
    found, first = controlnets_of(pipe), CONTROLNET_SLOTS[0]
    if found and first not in found:
        raise ValueError(f"model.{min(found)} is set, but model.{first} is null; set that one first.")
    for name, network in found.items() if pipe.network is not None else ():
        pipe.control_family.check(name, network, pipe.network)
