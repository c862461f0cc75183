"""Context parallelism for a training: check that it is possible, then split the tokens of the predicting networks."""

from typing import TYPE_CHECKING

from ..core.context_parallel import Devices, check_splittable, split_tokens
from .memory_layout import predicting_networks

if TYPE_CHECKING:
    from .training_module import PipelineTrainingModule


def check_split(module: "PipelineTrainingModule", cp_size: int) -> None:
    """Refuse a training whose tokens cannot be split over `cp_size` devices; works on the meta device.

    Raises:
        ValueError: The message names the obstacle, and what to set.
    """
    if not module.task.calls_model_fn:
        raise ValueError(
            f"cp_size is {cp_size}, but {type(module.task).__name__} calls no network whose tokens could be split; "
            "set it to 1."
        )
    if module.task.reads_features:
        raise ValueError(
            f"cp_size is {cp_size}, but the discriminator of {type(module.task).__name__} reads all tokens of a layer, "
            "which are then split over devices; set it to 1."
        )
    if module.memory.compile != "none":
        raise ValueError(
            f"cp_size is {cp_size} and memory.compile={module.memory.compile}: tokens are split by hooks, which cannot "
            "be compiled; set memory.compile=none."
        )
    for network in predicting_networks(module):
        check_splittable(network, cp_size)


def split_predicting(module: "PipelineTrainingModule", devices: Devices) -> None:
    """Make each predicting network of a loaded module compute on this device's part of the tokens only."""
    for network in predicting_networks(module):
        split_tokens(network, devices)
