"""Context parallelism: the tokens of one sample are split across several devices, which exchange them in attention.

Ulysses, Jacobs et al. 2023 (https://arxiv.org/abs/2309.14509). Outside of attention a device holds all heads of a part
of the tokens; inside attention it holds all tokens of a part of the heads. Every exchange is differentiable, and its
backward pass is its exact adjoint. The gradient of the mean of all devices' losses is therefore the mean of the
devices' gradients, which is what DDP and FSDP2 compute.

Shapes: B batch, L tokens, D width. "Own" tokens and heads are those of this device.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

TOKENS, HEADS = 1, 2  # dimensions of queries, keys and values (B, L, heads, head_dim)


class Devices:
    """The devices across which the tokens of one sample are split.

    Args:
        group: The process group with one process per device.
    """

    def __init__(self, group: ProcessGroup):
        self.group, self.rank, self.count = group, group.rank(), group.size()

    def shares(self, count: int) -> list[int]:
        """The number of tokens that each device gets of `count` tokens; the numbers differ by at most 1."""
        return [count // self.count + (rank < count % self.count) for rank in range(self.count)]

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send each device one part, of any shape; return the tensors that arrive from each, in the given shapes."""
        sent = torch.cat([part.flatten() for part in parts])
        sizes = [part.numel() for part in parts]
        counts = [prod(shape) for shape in shapes]
        received = self._exchange(sent, sizes, counts).split(counts)
        return [flat.view(shape) for flat, shape in zip(received, shapes, strict=True)]

    def _exchange(self, sent: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
        """Send `sizes` elements of a flat tensor to each device; return the `counts` elements from each, flat."""
        return _AllToAll.apply(sent, sizes, counts, self.group)


class _AllToAll(torch.autograd.Function):
    """`all_to_all_single` whose backward pass sends the gradients back by the same exchange in reverse."""

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
    """How the text and image tokens of one forward pass are split across devices.

    Args:
        devices: The devices that hold the tokens.
        text, image: Numbers of text tokens and of image tokens on each device.
    """

    devices: Devices
    text: Sequence[int]
    image: Sequence[int]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens on each device; in attention a device's text tokens come before its image tokens."""
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
        """This device's heads (B, L, own heads, D) of a tensor (B, L, heads, D) that every device has in full."""
        return keys.chunk(self.devices.count, dim=HEADS)[self.devices.rank]

    def mask(self, text: Tensor) -> Tensor:
        """The attention mask (B, L) of all tokens, from the mask (B, text tokens) of the text, which every device has.

        The tokens are in the order in which `to_heads` puts them: text, then image, device by device.
        """
        masks = []
        for part, image_tokens in zip(text.split(list(self.text), dim=TOKENS), self.image, strict=True):
            masks += [part, part.new_ones(len(part), image_tokens)]
        return torch.cat(masks, dim=TOKENS)

    def gathered(self, tokens: Tensor) -> Tensor:
        """(B, own image tokens, D) → (B, all image tokens, D)."""
        batch, _, width = tokens.shape
        shapes = [(batch, count, width) for count in self.image]
        return torch.cat(self.devices.exchange([tokens] * self.devices.count, shapes), dim=TOKENS)


def check_splittable(network: nn.Module, devices: int) -> None:
    """Check that a network can run under context parallelism; works on the meta device.

    Raises:
        ValueError: The network has no `_cp_plan`, its number of heads is not a multiple of `devices`, or an attention
            processor takes no `split` and would therefore see one device's tokens only.
    """
    name = type(network).__name__
    if not getattr(network, "_cp_plan", None):
        raise ValueError(
            f"{name} has no _cp_plan, which says where its tokens are split; remove cp_size, which splits them."
        )
    if (heads := network.config.num_attention_heads) % devices:
        fits = [count for count in range(2, heads + 1) if heads % count == 0]
        raise ValueError(
            f"{name} has {heads} heads, which cp_size={devices} does not divide; set cp_size to one of {fits}."
        )
    for processor in (layer.processor for layer in network.modules() if hasattr(layer, "processor")):
        by_tables = getattr(processor, "split_comes_with_tables", False)
        if not by_tables and "split" not in inspect.signature(processor.__call__).parameters:
            raise ValueError(
                f"{name}: {type(processor).__name__} does not exchange split tokens, as it takes no argument `split`; "
                "remove cp_size."
            )


def split_tokens(network: nn.Module, devices: Devices) -> None:
    """Make a network compute on this device's part of the tokens; its inputs and outputs stay whole sequences.

    The network's `_cp_plan`, which diffusers defines, says where tokens are split and gathered. Attention processors
    receive the `TokenSplit` of the forward pass as their argument `split`, or as an attribute of the rotary tables
    (`OwnTables`) if the network passes them no arguments.
    """
    hooks = _Hooks(devices, _named_inputs(network))
    begin = partial(hooks.begin, network)
    network.register_forward_pre_hook(_named(begin), with_kwargs=True)  # before the hooks that split tokens
    network.register_forward_hook(lambda *_: hooks.end())
    for path, plan in network._cp_plan.items():
        for module in _modules_at(network, path):
            if not isinstance(plan, Mapping):
                module.register_forward_hook(lambda _, __, tokens: hooks.gathered(tokens))
            elif all(isinstance(name, str) for name in plan):
                module.register_forward_pre_hook(_named(partial(hooks.own_inputs, plan)), with_kwargs=True)
            else:
                module.register_forward_hook(lambda _, __, outputs, plan=plan: hooks.own_outputs(plan, outputs))


def _named_inputs(network: nn.Module) -> set[str]:
    """The inputs of modules that the network's plan splits."""
    plans = [plan for plan in network._cp_plan.values() if isinstance(plan, Mapping)]
    return {name for plan in plans for name in plan if isinstance(name, str)}


class OwnTables(tuple):
    """The rotary tables of a device's own tokens, and how the tokens are split."""

    split: TokenSplit


class _Hooks:
    """The hooks of one network. `split` belongs to the forward pass that is running; it is None outside of one.

    Args:
        named: The inputs of modules that are split; without the text among them each device has all of it.
    """

    def __init__(self, devices: Devices, named: Collection[str]):
        self.devices, self.named = devices, named
        self.split: TokenSplit | None = None

    def begin(self, network: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Set `split` and add it to the keyword arguments of attention."""
        text = inputs["encoder_hidden_states"].shape[TOKENS] if "encoder_hidden_states" in self.named else 0
        image = _image_tokens(network, inputs["hidden_states"])
        self.split = TokenSplit(self.devices, self.devices.shares(text), self.devices.shares(image))
        if not text:
            return inputs
        (kwargs,) = (name for name in inputs if name.endswith("attention_kwargs"))  # diffusers has two names for it
        return {**inputs, kwargs: {**(inputs[kwargs] or {}), "split": self.split}}

    def end(self) -> None:
        self.split = None

    def gathered(self, tokens: Tensor) -> Tensor:
        """All image tokens (B, L, D); outside of the network's forward the layer's tokens are whole already."""
        return self.split.gathered(tokens) if self.split else tokens

    def own_inputs(self, plan: Mapping, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A module's inputs. Those that its plan names are cut to this device's tokens.

        The mask of the text stays whole, because attention attends to all text tokens.
        """
        split = {name for name in plan if _has_tokens(inputs[name]) and not name.endswith("_mask")}
        return {name: self._part(plan[name], value) if name in split else value for name, value in inputs.items()}

    def own_outputs(self, plan: Mapping[int, Any], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        own = (self._part(plan[number], tensor) for number, tensor in enumerate(outputs))
        if sum(self.split.text):
            return tuple(own)
        tables = OwnTables(own)
        tables.split = self.split
        return tables

    def _part(self, plan: Any, tensor: Tensor) -> Tensor:
        dim = plan.split_dim - plan.expected_dims  # counted from the end: RoPE tables may have no batch dimension
        shares = self.devices.shares(tensor.shape[dim])
        return tensor.split(shares, dim=dim)[self.devices.rank]


def _image_tokens(network: nn.Module, hidden_states: Tensor) -> int:
    """Number of image tokens of a network's input: of tokens (B, L, D), or of latents (B, C, T, h, w) in patches."""
    if hidden_states.dim() == 3:
        return hidden_states.shape[TOKENS]
    return prod(hidden_states.shape[2:]) // prod(network.config.patch_size)


def _has_tokens(value: Tensor | None) -> bool:
    return value is not None and value.dim() > 1  # a timestep (B,) is one of all tokens of a sample


def _named(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
    """A forward pre-hook that passes a module's arguments, bound to their names, through `change`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        (_, *arguments) = bound.arguments.items()  # the first one is self
        return (), change(dict(arguments))

    return hook


def _modules_at(network: nn.Module, path: str) -> list[nn.Module]:
    """The submodule at a path, or for a path such as `blocks.*` all modules of that list."""
    if path.endswith(".*"):
        return list(network.get_submodule(path.removesuffix(".*")))
    return [network.get_submodule(path)]
