"""Context parallelism: the tokens of one sample lie on several devices, which exchange them within attention.

Ulysses, Jacobs et al. 2023 (https://arxiv.org/abs/2309.14509): outside of attention a device has some of the tokens,
within it all of them in some of the heads. Every exchange is differentiable, and its backward pass the exact adjoint:
the gradient of the mean of all devices' losses is then the mean of their gradients, which is what DDP and FSDP2 take.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

HEADS, TOKENS = 2, 1  # dimensions of queries, keys and values (B, L, heads, head_dim)


class Devices:
    """The devices that have one sample's tokens together.

    Args:
        group: Their processes.
    """

    def __init__(self, group: ProcessGroup):
        self.group, self.rank, self.count = group, group.rank(), group.size()

    def shares(self, count: int) -> list[int]:
        """How many of so many tokens each has."""
        return [count // self.count + (rank < count % self.count) for rank in range(self.count)]

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send each device its part; returns what comes from each, of these shapes."""
        sent, counts = torch.cat([part.flatten() for part in parts]), list(map(prod, shapes))
        received = self._exchange(sent, [part.numel() for part in parts], counts)
        return [numbers.view(shape) for numbers, shape in zip(received.split(counts), shapes, strict=True)]

    def _exchange(self, sent: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
        return _AllToAll.apply(sent, sizes, counts, self.group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent: Tensor, sizes: list[int], counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.back = counts, sizes, group
        received = sent.new_empty(sum(counts))
        torch.distributed.all_to_all_single(received, sent.contiguous(), counts, sizes, group)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return _AllToAll.apply(gradient, *ctx.back), None, None, None


@dataclass(frozen=True)
class TokenSplit:
    """Where the tokens of one forward pass are: those of text and of image in equal parts, up to one token.

    Args:
        devices: That share them.
        text, image: How many of either each of these has.
    """

    devices: Devices
    text: Sequence[int]
    image: Sequence[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens on each device, text first, as they follow one another in its attention."""
        return [sum(pair) for pair in zip(self.text, self.image, strict=True)]

    def to_heads(self, tokens: Tensor) -> Tensor:
        """(B, own tokens, heads, D) → (B, all tokens, own heads, D)."""
        parts = tokens.chunk(self.devices.count, dim=HEADS)
        batch, _, heads, width = parts[0].shape
        shapes = [(batch, length, heads, width) for length in self.lengths]
        return torch.cat(self.devices.exchange(parts, shapes), dim=TOKENS)

    def to_tokens(self, heads: Tensor) -> Tensor:
        """(B, all tokens, own heads, D) → (B, own tokens, heads, D)."""
        parts = heads.split(self.lengths, dim=TOKENS)
        own = parts[self.devices.rank].shape
        return torch.cat(self.devices.exchange(parts, [own] * self.devices.count), dim=HEADS)

    def own_heads(self, keys: Tensor) -> Tensor:
        """Of (B, L, heads, D) that all devices have."""
        return keys.chunk(self.devices.count, dim=HEADS)[self.devices.rank]

    def mask(self, text: Tensor) -> Tensor:
        """Where a mask (B, text tokens), which all devices have, lets attention look at all tokens (B, L)."""
        parts = zip(text.split(list(self.text), dim=TOKENS), self.image, strict=True)
        return torch.cat([*chain(*((part, part.new_ones(len(part), count)) for part, count in parts))], dim=TOKENS)

    def gathered(self, tokens: Tensor) -> Tensor:
        """(B, own tokens of the image, D) → (B, all of them, D)."""
        batch, _, width = tokens.shape
        shapes = [(batch, count, width) for count in self.image]
        return torch.cat(self.devices.exchange([tokens] * self.devices.count, shapes), dim=TOKENS)


def check_splittable(network: nn.Module, devices: int) -> None:
    """Refuse a network whose sequences cannot be split; works on the meta device.

    Raises:
        ValueError: It does not say where its tokens come in and go out, has another number of heads, or attention that
            would look at one device's tokens alone.
    """
    name = type(network).__name__
    if not getattr(network, "_cp_plan", None):
        raise ValueError(f"{name} does not say where its tokens could be split (`_cp_plan`); take cp_size out.")
    if (heads := network.config.num_attention_heads) % devices:
        fits = [count for count in range(2, heads + 1) if heads % count == 0]
        raise ValueError(f"{name} has {heads} heads, which cp_size={devices} does not divide; choose one of {fits}.")
    for processor in (layer.processor for layer in network.modules() if hasattr(layer, "processor")):
        if "split" not in inspect.signature(processor.__call__).parameters:
            raise ValueError(f"{name}: {type(processor).__name__} does not exchange split tokens; take cp_size out.")


def split_tokens(network: nn.Module, devices: Devices) -> None:
    """Have a network take and return whole sequences, and compute on this device's part of them.

    Where tokens are split and gathered is what diffusers writes in its networks' `_cp_plan`. Attention is handed the
    `TokenSplit` by which it has to exchange, as `split`.
    """
    hooks = _Hooks(devices)
    network.register_forward_pre_hook(_named(hooks.start), with_kwargs=True)  # before its own tokens are split
    network.register_forward_hook(lambda *_: hooks.end())
    for place, plan in network._cp_plan.items():
        for module in _at(network, place):
            if not isinstance(plan, Mapping):
                module.register_forward_hook(lambda _, __, tokens: hooks.gathered(tokens))
            elif all(isinstance(name, str) for name in plan):
                module.register_forward_pre_hook(_named(partial(hooks.own, plan)), with_kwargs=True)
            else:
                module.register_forward_hook(lambda _, __, made, plan=plan: hooks.own_outputs(plan, made))


class _Hooks:
    """What is done to a network's tokens; `split` is that of the forward pass under way, and None between two."""

    def __init__(self, devices: Devices):
        self.devices = devices
        self.split: TokenSplit | None = None

    def start(self, given: dict[str, Any]) -> dict[str, Any]:
        text, image = (given[name].shape[TOKENS] for name in ("encoder_hidden_states", "hidden_states"))
        self.split = TokenSplit(self.devices, self.devices.shares(text), self.devices.shares(image))
        (to_blocks,) = (name for name in given if name.endswith("attention_kwargs"))
        return {**given, to_blocks: {**(given[to_blocks] or {}), "split": self.split}}

    def end(self) -> None:
        self.split = None

    def gathered(self, tokens: Tensor) -> Tensor:
        """As they are where a layer is called by itself."""
        return self.split.gathered(tokens) if self.split else tokens

    def own(self, plan: Mapping, given: Mapping[str, Any]) -> dict[str, Any]:
        """This device's part of what is to be split; masks of the text stay whole, as attention looks at all of it."""
        split = {name for name in plan if given[name] is not None and not name.endswith("_mask")}
        return {name: self._part(plan[name], value) if name in split else value for name, value in given.items()}

    def own_outputs(self, plan: Mapping[int, Any], made: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._part(plan[number], tensor) for number, tensor in enumerate(made))

    def _part(self, plan: Any, tensor: Tensor) -> Tensor:
        dim = plan.split_dim - plan.expected_dims  # from the end, as places may come without a batch
        shares = self.devices.shares(tensor.shape[dim])
        return tensor.split(shares, dim=dim)[self.devices.rank]


def _named(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
    """A hook that changes a module's arguments, which come by their names with their defaults."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        (_, *given) = bound.arguments.items()
        return (), change(dict(given))

    return hook


def _at(network: nn.Module, place: str) -> list[nn.Module]:
    """The module at a place, or all in a list of them, `blocks.*`."""
    if place.endswith(".*"):
        return list(network.get_submodule(place.removesuffix(".*")))
    return [network.get_submodule(place)]
