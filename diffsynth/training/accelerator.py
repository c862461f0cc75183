"""Makes the `accelerate.Accelerator` of a run, which holds its device and its precision."""

from datetime import timedelta
from typing import TYPE_CHECKING

from ..core.devices import choose_device, set_kernels
from .engines.launcher import check_launch, own_parallelism

# How long processes wait for one another; NCCL's own 10 minutes are too short while the first one saves a checkpoint:
# full training of 20 billion weights writes 245 GB (computed), 8 minutes at 0.5 GB/s. Two hours are a guess.
TIMEOUT = timedelta(hours=2)

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str, torch_dtype: str, deterministic: bool = False) -> "Accelerator":
    """Return an accelerator on `device` that computes in `torch_dtype`.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        torch_dtype: `float32` or `bfloat16`.
        deterministic: Use kernels whose results are the same in every run; others add in the order in which threads
            end. On a CPU all are.

    Every call makes a new one, because the jobs of a sweep run in one process and may differ in precision.

    Raises:
        ValueError: The launcher's file sets another device or another precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)  # a global that may have another job's precision
    check_launch(chosen := choose_device(device), torch_dtype)
    set_kernels(deterministic)
    return Accelerator(
        cpu=chosen == "cpu",
        mixed_precision="bf16" if torch_dtype == "bfloat16" else "no",
        parallelism_config=own_parallelism(chosen),
        kwargs_handlers=[
            # Released networks have parameters that get no gradient, such as those of the last block's text output. To
            # search a graph of 11,500 nodes for 1,440 parameters takes 5 ms of a CPU core (measured 2026-11-30), once
            # an optimizer step.
            # Gradients are views of the buckets that are sent, so that there is one copy of them.
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
