"""Makes the `accelerate.Accelerator` of a run, which holds its device and its precision."""

from typing import TYPE_CHECKING

from ..core.devices import choose_device
from .engines.launcher import check_launch, own_parallelism

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str, torch_dtype: str) -> "Accelerator":
    """Return an accelerator on `device` that computes in `torch_dtype`.

    Every call makes a new one, because the jobs of a sweep run in one process and may differ in precision.

    Raises:
        ValueError: The launcher's file sets another device or another precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)  # a global that may have another job's precision
    check_launch(chosen := choose_device(device), torch_dtype)
    return Accelerator(
        cpu=chosen == "cpu",
        mixed_precision="bf16" if torch_dtype == "bfloat16" else "no",
        parallelism_config=own_parallelism(chosen),
        # Released networks have parameters that get no gradient, such as those of the last block's text output.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
