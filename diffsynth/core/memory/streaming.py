"""Frozen weights of blocks that wait in host memory and are copied in ahead of their turn.

Copies go one way, into a ring of buffers on the device: frozen weights never change, so that nothing is written back.
Streamed blocks are spread evenly over the network, so that each copy has the same number of resident blocks to hide
behind; side by side they would have one another only. The last block is among them, as it is still there when the
backward pass begins with it. The device has room for a block because it is always computed again in the backward pass
(`memory.checkpointing=blocks`): what autograd would save of weights refers to buffers that others overwrite.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..gradient import is_checkpointed, repeated_blocks
from . import host


def check_streaming(network: nn.Module, count: int, trained: Collection[str]) -> None:
    """Refuse to stream what cannot be; works on the meta device.

    Args:
        count: Blocks to stream.
        trained: Names of modules of the network that are trained in full; the empty name is all of it.

    Raises:
        ValueError: There are not so many blocks with frozen weights.
    """
    blocks, names = repeated_blocks(network), {module: name for name, module in network.named_modules()}
    frozen = [block for block in blocks if not _is_trained(block, names[block], trained)]
    if count > len(frozen):
        raise ValueError(
            f"memory.stream_blocks={count}: of the {len(blocks)} repeated blocks of {type(network).__name__} "
            f"{len(frozen)} have frozen weights, which alone can be streamed; set at most that."
        )


def _is_trained(block: nn.Module, name: str, trained: Collection[str]) -> bool:
    within = [f"{name}.{key}" for key, _ in block.named_parameters()]
    return all(any(f"{key}.".startswith(f"{part}.") or not part for part in trained) for key in within)


def stream_blocks(network: nn.Module, count: int, buffers: int, device: torch.device) -> "BlockStream":
    """Stream the frozen weights of `count` blocks, and bring the rest of a network in host memory to `device`.

    Args:
        buffers: Streamed blocks that the device has room for.
    """
    frozen = [block for block in repeated_blocks(network) if not all(p.requires_grad for p in block.parameters())]
    home = next(network.parameters()).device
    device = home if home.type == "meta" else device
    stream = BlockStream(spread(frozen, count), buffers, device)
    if home != device:  # tensors without values cannot even be moved to where they are
        network.to(device)
    return stream


def spread(blocks: Sequence, count: int) -> list:
    """`count` of the blocks, as evenly as can be, the last among them."""
    return [blocks[-(-(number + 1) * len(blocks) // count) - 1] for number in range(count)]


def _frozen(block: nn.Module) -> list[Tensor]:
    """A block's parameters that are not trained, and its buffers."""
    return [tensor for tensor in chain(block.parameters(), block.buffers()) if not tensor.requires_grad]


class StreamedBlock:
    """A block whose frozen tensors lie in one buffer of host memory, and at times in one on the device."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.block, self.tensors = block, _frozen(block)
        if wrapped := [type(tensor).__name__ for tensor in self.tensors if is_traceable_wrapper_subclass(tensor)]:
            raise ValueError(
                f"memory.stream_blocks: a {wrapped[0]} cannot be streamed, only plain tensors; set it to 0."
            )
        self.host = host.empty(host.flat_size(self.tensors), device)
        self.views = host.flat_views(self.host, self.tensors)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            view.copy_(tensor)
            tensor.data = view  # lets go of what was loaded, one by one
        self.buffer = self.arrival = None
        block._apply = self._apply_to_the_rest

    @property
    def size(self) -> int:
        return len(self.host)

    def copy_into(self, buffer: Tensor, lane: host.Lane) -> None:
        """Begin to copy into a buffer on the device, after what the computation was asked to do with it before."""
        self.buffer = buffer[: self.size]
        with lane.after_computation():
            host.fill(self.buffer, self.host)
        self.arrival = lane.mark()

    def bind(self, lane: host.Lane) -> None:
        """Let the block compute with the weights in its buffer, once they are there."""
        lane.wait(self.arrival)
        self._point_to(host.flat_views(self.buffer, self.tensors))

    def leave(self) -> None:
        """Give the buffer back."""
        self.buffer = None
        self._point_to(self.views)

    def _point_to(self, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def _apply_to_the_rest(self, fn: Callable, *args, **kwargs) -> nn.Module:
        """What `block.to(device)` calls: it must not bring the streamed tensors along."""
        streamed = {id(tensor) for tensor in self.tensors}
        homes = [home for module in self.block.modules() for home in (module._parameters, module._buffers)]
        kept = [(home, name, tensor) for home in homes for name, tensor in home.items() if id(tensor) in streamed]
        for home, name, _ in kept:
            home[name] = None
        try:
            return type(self.block)._apply(self.block, fn, *args, **kwargs)
        finally:
            for home, name, tensor in kept:
                home[name] = tensor


class BlockStream:
    """Brings each block's weights in before it runs, and meanwhile those of the blocks that will run next.

    Args:
        blocks: In the order in which they run forward.
        buffers: How many of them the device has room for.
    """

    def __init__(self, blocks: Sequence[nn.Module], buffers: int, device: torch.device):
        self.blocks = [StreamedBlock(block, device) for block in blocks]
        self.lane = host.lane(device)
        size = max(block.size for block in self.blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(buffers)]
        self.occupants: list[int | None] = [None] * buffers
        self.last = 0
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, number))

    @property
    def tensors(self) -> list[Tensor]:
        """All that is streamed."""
        return [tensor for block in self.blocks for tensor in block.tensors]

    def _enter(self, number: int, *_) -> None:
        if torch.is_grad_enabled() and not is_checkpointed():
            raise RuntimeError(
                "A block whose weights are streamed runs with gradients but without checkpointing, so that autograd "
                "would save weights that others overwrite; pass use_gradient_checkpointing=True to model_fn."
            )
        wanted = self._next(number)
        for other in wanted:
            if other not in self.occupants:
                self._fetch(other, wanted)
        self.blocks[number].bind(self.lane)

    def _next(self, number: int) -> list[int]:
        """Blocks to have on the device: this one, and as many of those that run next as there is room for."""
        room, count = len(self.buffers), len(self.blocks)
        returns = torch.is_grad_enabled()  # a backward pass goes through the blocks in reverse
        goes_back = 0 < number < self.last or (returns and number == count - 1)
        self.last = number
        if goes_back:
            return list(range(number, max(number - room, -1), -1))
        ahead = range(number, number + room)
        return [n for n in ahead if n < count] if returns else [n % count for n in ahead]

    def _fetch(self, number: int, wanted: Collection[int]) -> None:
        """Begin to copy a block into a buffer that has none of the wanted ones."""
        place, occupant = next((p, other) for p, other in enumerate(self.occupants) if other not in wanted)
        if occupant is not None:
            self.blocks[occupant].leave()
        self.occupants[place] = number
        self.blocks[number].copy_into(self.buffers[place], self.lane)
