"""A rehearsal for CUDA keeps in fp32 what CUDA's autocast keeps there."""

import pytest
import torch
import torch.nn.functional as F

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.plan.cuda_autocast import cuda_autocast

IN_FP32 = {
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: torch.nn.GroupNorm(2, 4).bfloat16()(x),
    "softmax": lambda x: x.softmax(-1),
    "power": lambda x: x**2,
    "norm": lambda x: x.norm(dim=-1),
    "exponential": torch.exp,
    "cumulative sum": lambda x: x.cumsum(-1),
    "sum": lambda x: x.sum(-1),
}
IN_BF16 = {
    "linear": torch.nn.Linear(4, 4),
    "silu": F.silu,
    "addition": lambda x: x + x,
    "softmax of a chosen dtype": lambda x: x.softmax(-1, dtype=torch.bfloat16),
}


def result(operation) -> torch.Tensor:
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), cuda_autocast():
        found = operation(x)
    found.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    return found


def test_what_is_recomputed_has_the_same_dtypes():
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), cuda_autocast():
        found = gradient_checkpoint_forward(lambda x: F.layer_norm(x, (4,)).sin(), True, False, x)
    found.sum().backward()  # raises where the dtypes differ
    assert x.grad is not None


@pytest.mark.parametrize("operation", IN_FP32.values(), ids=IN_FP32)
def test_cudas_autocast_runs_it_in_fp32(operation):
    assert result(operation).dtype == torch.float32


@pytest.mark.parametrize("operation", IN_BF16.values(), ids=IN_BF16)
def test_the_rest_stays_in_bf16(operation):
    assert result(operation).dtype == torch.bfloat16
