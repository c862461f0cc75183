"""One of several devices that have a sample's tokens together, without the others."""

import torch
from torch import Tensor

from ..core.context_parallel import Devices


class FirstOf(Devices):
    """The first of so many, which has the most tokens; what the others would send has a shape, and any values."""

    def __init__(self, count: int):
        self.rank, self.count = 0, count

    def _exchange(self, sent: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
        return _Received.apply(sent, sum(counts))


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent: Tensor, count: int) -> Tensor:
        ctx.sent = sent.numel()
        return sent.new_zeros(count)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.sent), None
