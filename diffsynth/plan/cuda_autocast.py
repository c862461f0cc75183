"""What autocast does on CUDA, for rehearsals, which run on a CPU whose autocast has another list of operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..core.gradient import recomputing_in

# Operations that CUDA's autocast runs in fp32 and that networks use, by the names of torch's functions and methods:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float32
IN_FP32 = {
    "__pow__", "cosine_similarity", "cumprod", "cumsum", "exp", "expm1", "group_norm", "l1_loss", "layer_norm", "log",
    "log1p", "log_softmax", "mse_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rms_norm", "rsqrt",
    "smooth_l1_loss", "softmax", "softplus", "sum",
}  # fmt: skip


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside a CPU's autocast, let operations have CUDA's dtypes, also where their blocks are recomputed later."""
    with CudaAutocast(), recomputing_in(lambda block: CudaAutocast()):
        yield


class CudaAutocast(TorchFunctionMode):
    """While active, operations of `IN_FP32` get their bf16 tensors as fp32 copies, and so return fp32."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in IN_FP32 and kwargs.get("dtype") is None:
            args, kwargs = tree_map(_in_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _in_fp32(value: Any) -> Any:
    is_bf16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_bf16 else value
