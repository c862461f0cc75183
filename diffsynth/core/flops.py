"""Count the floating-point operations of matrix products, convolutions and attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
# torch counts the attention of GPUs only; on a CPU the same arguments go to these.
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Flops(TorchDispatchMode):
    """Counts operations while the mode is active: two for a multiplication and its addition.

    Everything else, such as norms and activations, takes memory bandwidth rather than arithmetic and counts as nothing.

    Attributes:
        total: Operations so far.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs or {}, out_val=result)
        elif packet in ON_CPU:
            self.total += ON_CPU[packet](*(arg.shape for arg in args if isinstance(arg, torch.Tensor)))
        return result
