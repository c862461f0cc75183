"""Block streaming: frozen weights of blocks stay in host memory and are copied to the device before a block runs.

Copies only go to the device, into a ring of buffers: frozen weights never change, so nothing is copied back. Streamed
blocks are spread evenly over the network, so that the same number of resident blocks computes during each copy. The
last block is streamed, because its weights are still on the device when the backward pass begins with it.

Streaming needs `memory.checkpointing=blocks`: without it, autograd would save references to weights in buffers that
other blocks overwrite before the backward pass.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import host_memory
from ..gradient import is_checkpointed, repeated_blocks


def check_streaming(network: nn.Module, count: int, trained: Collection[str]) -> None:
    """Check that a network has `count` blocks to stream; works on the meta device.

    Args:
        count: Number of blocks to stream.
        trained: Names of the network's modules that are trained in full; the empty name stands for all of it.

    Raises:
        ValueError: Fewer blocks have frozen weights.
    """
    blocks, names = repeated_blocks(network), {module: name for name, module in network.named_modules()}
    frozen = [block for block in blocks if not _is_trained(block, names[block], trained)]
    if count > len(frozen):
        raise ValueError(
            f"memory.stream_blocks={count}: of the {len(blocks)} repeated blocks of {type(network).__name__} "
            f"{len(frozen)} have frozen weights, and only those can be streamed; set memory.stream_blocks to at most "
            f"{len(frozen)}."
        )


def _is_trained(block: nn.Module, name: str, trained: Collection[str]) -> bool:
    """Whether all parameters of a block, which has this name, are in modules that are trained in full."""
    within = [f"{name}.{key}" for key, _ in block.named_parameters()]
    return all(any(f"{key}.".startswith(f"{part}.") or not part for part in trained) for key in within)


def stream_blocks(network: nn.Module, count: int, buffers: int, device: torch.device) -> "BlockStream":
    """Stream the frozen weights of `count` blocks, and move the rest of the network to `device`.

    Args:
        buffers: Number of streamed blocks that the device has room for.
    """
    frozen = [block for block in repeated_blocks(network) if not all(p.requires_grad for p in block.parameters())]
    home = next(network.parameters()).device
    device = home if home.type == "meta" else device
    stream = BlockStream(spread(frozen, count), buffers, device)
    if home != device:  # tensors without values cannot be moved, even to their own device
        network.to(device)
    return stream


def spread(blocks: Sequence, count: int) -> list:
    """Choose `count` of the blocks, evenly spread, the last one included."""
    return [blocks[-(-(number + 1) * len(blocks) // count) - 1] for number in range(count)]


def _frozen(block: nn.Module) -> list[Tensor]:
    """The frozen parameters and the buffers of a block."""
    return [tensor for tensor in chain(block.parameters(), block.buffers()) if not tensor.requires_grad]


class StreamedBlock:
    """A block whose frozen tensors are views of one buffer in host memory, or for a time of one on the device.

    Raises:
        ValueError: A tensor is of a subclass that has no plain storage.
    """

    def __init__(self, block: nn.Module, device: torch.device):
        self.block, self.tensors = block, _frozen(block)
        if wrapped := [type(tensor).__name__ for tensor in self.tensors if is_traceable_wrapper_subclass(tensor)]:
            raise ValueError(
                f"memory.stream_blocks: a parameter is a {wrapped[0]}, and only plain tensors can be streamed; set "
                "memory.stream_blocks=0."
            )
        self.host = host_memory.empty(host_memory.flat_size(self.tensors), device)
        self.views = host_memory.flat_views(self.host, self.tensors)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            view.copy_(tensor)
            tensor.data = view  # frees the loaded tensors one at a time
        self.buffer = self.arrival = None
        block._apply = self._apply_to_the_rest

    @property
    def size(self) -> int:
        """Bytes of the streamed tensors."""
        return len(self.host)

    def copy_into(self, buffer: Tensor, lane: host_memory.Lane) -> None:
        """Begin to copy the weights into a uint8 buffer (bytes,) on the device, after computation that uses it."""
        self.buffer = buffer[: self.size]
        with lane.after_computation():
            host_memory.fill(self.buffer, self.host)
        self.arrival = lane.mark()

    def bind(self, lane: host_memory.Lane) -> None:
        """Point the block's tensors to the device buffer; the computation waits until the copy is done."""
        lane.wait(self.arrival)
        self._point_to(host_memory.flat_views(self.buffer, self.tensors))

    def leave(self) -> None:
        """Point the block's tensors to host memory again and release the device buffer."""
        self.buffer = None
        self._point_to(self.views)

    def _point_to(self, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def _apply_to_the_rest(self, fn: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        """`_apply` for all tensors but the streamed ones: `block.to(device)` calls it and must not move those."""
        streamed = {id(tensor) for tensor in self.tensors}
        dicts = [tensors for module in self.block.modules() for tensors in (module._parameters, module._buffers)]
        kept = [
            (tensors, name, tensor) for tensors in dicts for name, tensor in tensors.items() if id(tensor) in streamed
        ]
        for tensors, name, _ in kept:
            tensors[name] = None
        try:
            return type(self.block)._apply(self.block, fn, *args, **kwargs)
        finally:
            for tensors, name, tensor in kept:
                tensors[name] = tensor


class BlockStream:
    """Copies each block's weights to the device before the block runs, and ahead of time those of the next blocks.

    Args:
        blocks: The streamed blocks in the order of the forward pass.
        buffers: Number of blocks that the device has room for.
    """

    def __init__(self, blocks: Sequence[nn.Module], buffers: int, device: torch.device):
        self.blocks = [StreamedBlock(block, device) for block in blocks]
        self.lane = host_memory.lane(device)
        size = max(block.size for block in self.blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(buffers)]
        self.occupants: list[int | None] = [None] * buffers  # the block in each buffer
        self.last = 0
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, number))

    @property
    def tensors(self) -> list[Tensor]:
        """All streamed tensors."""
        return [tensor for block in self.blocks for tensor in block.tensors]

    def _enter(self, number: int, *_: Any) -> None:
        """Forward pre-hook of block `number`."""
        if torch.is_grad_enabled() and not is_checkpointed():
            raise RuntimeError(
                "A block with streamed weights runs with gradients but without checkpointing, so that autograd would "
                "save weights that are overwritten; pass use_gradient_checkpointing=True to model_fn."
            )
        wanted = self._next(number)
        for other in wanted:
            if other not in self.occupants:
                self._fetch(other, wanted)
        self.blocks[number].bind(self.lane)

    def _next(self, number: int) -> list[int]:
        """The blocks to have on the device: this one and those that run next, as many as there are buffers."""
        room, count = len(self.buffers), len(self.blocks)
        trains = torch.is_grad_enabled()  # then a backward pass follows, through the blocks in reverse
        is_backward = 0 < number < self.last or (trains and number == count - 1)
        self.last = number
        if is_backward:
            return list(range(number, max(number - room, -1), -1))
        ahead = range(number, number + room)
        return [n for n in ahead if n < count] if trains else [n % count for n in ahead]

    def _fetch(self, number: int, wanted: Collection[int]) -> None:
        """Begin to copy a block into a buffer that holds none of the wanted blocks."""
        buffer, occupant = next((n, block) for n, block in enumerate(self.occupants) if block not in wanted)
        if occupant is not None:
            self.blocks[occupant].leave()
        self.occupants[buffer] = number
        self.blocks[number].copy_into(self.buffers[buffer], self.lane)
