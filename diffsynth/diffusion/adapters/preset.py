"""A preset that stays an adapter of its own, so that it can be on in training and off in sampling."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

PRESET = "preset"  # name of the frozen adapter


def has_preset(network: nn.Module) -> bool:
    """Whether a network has an unmerged preset."""
    return PRESET in getattr(network, "peft_config", {})


def activate(network: nn.Module, adapters: Sequence[str]) -> None:
    """Make these adapters of a network the active ones; the same parameters as before are trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for layer in _adapted_layers(network):
        layer.set_adapter(list(adapters))
    for parameter, requires_grad in trained:  # `set_adapter` changes these flags
        parameter.requires_grad_(requires_grad)


@contextmanager
def without_preset(pipe: nn.Module) -> Iterator[None]:
    """Inside, the networks of a pipeline predict without their unmerged presets."""
    active = {
        network: _adapted_layers(network)[0].active_adapters for network in pipe.children() if has_preset(network)
    }
    for network, adapters in active.items():
        activate(network, [name for name in adapters if name != PRESET])
    try:
        yield
    finally:
        for network, adapters in active.items():
            activate(network, adapters)


def _adapted_layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
