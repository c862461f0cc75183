"""Several ControlNets at once: the sums of their outputs.

Shapes: B batch, C channels of the latents, h w latent size, L image tokens, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class BlockSums(Sequence[Tensor]):
    """The sums of several ControlNets' outputs (B, L, D) for each of a transformer's blocks, made when they are read.

    Args:
        outputs: Outputs of each ControlNet; one output serves several consecutive blocks.
        blocks: Number of the transformer's blocks.
        rounds_up: Whether an output belongs to a whole number of blocks, so that the last one may belong to fewer.
    """

    def __init__(self, outputs: Sequence[Sequence[Tensor]], blocks: int, rounds_up: bool):
        intervals = [blocks / len(own) for own in outputs]
        self.intervals = list(map(math.ceil, intervals)) if rounds_up else intervals
        self.outputs, self.blocks = outputs, blocks

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, block: int) -> Tensor:
        first, *others = (own[int(block / n)] for own, n in zip(self.outputs, self.intervals, strict=True))
        return sum(others, first)


def outputs_of(
    call: Callable[[Any, Any, float], Any],
    controlnets: Sequence[nn.Module],
    images: Sequence[Any],
    scale: float | Sequence[float],
) -> list[Any]:
    """What ControlNets put out for the images whose scale is above 0: one reads all images, or each reads its own.

    Args:
        call: `call(controlnet, image, its scale)`.
        images: What is read of each image, such as its latents (B, C, h, w).
        scale: One scale for all images, or one for each.
    """
    scales = scale if isinstance(scale, list | tuple) else [scale] * len(images)
    networks = controlnets if len(controlnets) > 1 else list(controlnets) * len(images)
    return [call(*own) for own in zip(networks, images, scales, strict=True) if own[2]]


def sum_block_outputs(
    found: Sequence[Sequence[Tensor]], blocks: int, rounds_up: bool = True
) -> Sequence[Tensor] | None:
    """The outputs (B, L, D) of ControlNets, or their sums, as a transformer's call takes them; see `BlockSums`."""
    found = [own for own in found if own]
    return BlockSums(found, blocks, rounds_up) if len(found) > 1 else found[0] if found else None


def sum_outputs_by_block(found: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor] | None:
    """The sums of ControlNets' outputs (B, L, D), by the number of the transformer's block; None without any."""
    blocks = sorted({block for own in found for block in own})
    each = {block: [own[block] for own in found if block in own] for block in blocks}
    return {block: sum(own[1:], own[0]) for block, own in each.items()} or None
