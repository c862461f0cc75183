"""The accelerator of a run: its device, its precision, and what the launcher's file says of both."""

from ..core.devices import choose_device
from .engines.launcher import check_launch, own_parallelism


def make_accelerator(device: str, torch_dtype: str):
    """An accelerator on `device` that computes in `torch_dtype`; a fresh one in every job of a sweep.

    Raises:
        ValueError: The launcher's file contradicts either.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)  # process-global, and mixed precision may differ
    check_launch(chosen := choose_device(device), torch_dtype)
    return Accelerator(
        cpu=chosen == "cpu",
        mixed_precision="bf16" if torch_dtype == "bfloat16" else "no",
        parallelism_config=own_parallelism(chosen),
        # Released networks carry parameters that no loss reaches, such as the last block's text output.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
