"""Context parallelism laid on a training: what cannot take it is refused, then its networks split their tokens."""

from ..core.context_parallel import Devices, check_splittable, split_tokens
from .memory_layout import predicting_networks


def check_split(module, cp_size: int) -> None:
    """Refuse what of a `PipelineTrainingModule` does not go with split tokens; works on the meta device.

    Raises:
        ValueError: Names it, and what to set.
    """
    if not module.task.calls_model_fn:
        raise ValueError(f"{type(module.task).__name__} calls no network whose tokens cp_size could split.")
    if module.task.reads_features:
        raise ValueError("A discriminator looks at the tokens within a network, which cp_size splits; set it to 1.")
    if module.memory.compile != "none":
        raise ValueError("memory.compile=blocks: tokens are split by hooks, which cannot be compiled; set none.")
    for network in predicting_networks(module):
        check_splittable(network, cp_size)


def split_predicting(module, devices: Devices) -> None:
    """Let the networks of a loaded module that predict compute on their part of the tokens."""
    for network in predicting_networks(module):
        split_tokens(network, devices)
