"""Applies a `MemoryRecipe` to a training: first the check that its networks support it, then the changes to them."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..core.gradient import check_policy, follow, honoured_policies
from ..core.memory.compile import check_compilable, compile_blocks
from ..core.memory.storage import choose_stored
from ..core.memory.streaming import check_streaming, stream_blocks
from .adapters import files as lora_files
from .template.model import is_below

if TYPE_CHECKING:
    from .training_module import PipelineTrainingModule


def check_memory(module: "PipelineTrainingModule") -> None:
    """Refuse a recipe that the networks of a training do not support; works on the meta device.

    Raises:
        ValueError: The message names the setting, the network, and what the network supports.
    """
    recipe, pipe, runs_blocks = module.memory, module.pipe, module.task.calls_model_fn
    for name in pipe.in_iteration_models if runs_blocks else module.trained_roots:
        network = getattr(pipe, name)
        # `blocks` is the default of most models, so it must not be an error where no network with blocks is trained.
        if network is not None and (runs_blocks or recipe.checkpointing != "blocks"):
            check_policy(network, recipe.checkpointing)
    _check_streamed(module)
    _check_compiled(module)


def _check_streamed(module: "PipelineTrainingModule") -> None:
    pipe, count = module.pipe, module.memory.stream_blocks
    if count and not module.task.calls_model_fn:
        raise ValueError(
            f"memory.stream_blocks is {count}, but {type(module.task).__name__} runs no network whose blocks could be "
            "streamed; set it to 0."
        )
    if count and pipe.network is not None:
        root = pipe.in_iteration_models[0]
        trained = [name for name in module.trainable_models if is_below([root], name)]
        below_root = [name.removeprefix(root).removeprefix(".") for name in trained]
        check_streaming(pipe.network, count, below_root)


def _check_compiled(module: "PipelineTrainingModule") -> None:
    if module.memory.compile == "none":
        return
    if not module.task.calls_model_fn:
        raise ValueError(
            f"memory.compile=blocks: {type(module.task).__name__} calls no network with blocks; set "
            "memory.compile=none."
        )
    if module.pipe.template is not None:
        raise ValueError(
            "memory.compile=blocks: a template gives each block other inputs, so that the blocks cannot share compiled "
            "code; set memory.compile=none."
        )
    if module.pipe.network is not None:  # `load` refuses a missing network
        check_compilable(module.pipe.network)


def stored_models(module: "PipelineTrainingModule") -> list[str]:
    """Names of the models whose weights `memory.storage` stores in fewer bits."""
    recipe, pipe, lora = module.memory, module.pipe, module.lora
    models = {name: pipe.named_model(name) for name in pipe.built_models}
    names = choose_stored(recipe.storage, recipe.stored, models, module.trainable_models)
    is_merged = lora and lora.preset and lora.preset_in_sampling
    if is_merged and (both := {*names} & {*lora.models}):
        raise ValueError(
            f"lora.preset cannot be merged into {min(both)}, which is stored by memory.storage={recipe.storage}: "
            f"{lora_files.ROUNDED_AWAY} lora.preset_in_sampling=false keeps it unmerged."
        )
    return names


def lay_out(module: "PipelineTrainingModule") -> None:
    """Apply the recipe to loaded networks: checkpointing, offloading, streaming, compilation.

    Afterwards no network may be moved or copied.
    """
    recipe, pipe = module.memory, module.pipe
    predicting = predicting_networks(module)
    for network in laid_out_networks(module):
        if recipe.checkpointing in honoured_policies(network):
            itself = network in predicting
            follow(network, recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, itself)
    if recipe.stream_blocks:
        stream = stream_blocks(pipe.network, recipe.stream_blocks, recipe.stream_buffers, pipe.device)
        for network in role_networks(module):  # they were copied from networks in host memory
            network.to(pipe.device)
        # DDP must not broadcast streamed weights: they move between devices. They are frozen, hence equal everywhere.
        module._ddp_params_and_buffers_to_ignore = names_of(module, stream.tensors)
    if recipe.compile == "blocks":
        compile_blocks(pipe.network)


def role_networks(module: "PipelineTrainingModule") -> list[nn.Module]:
    """The networks that the roles of a distillation add to those of the pipeline."""
    return list(module.role_networks.values()) if module.roles else []


def predicting_networks(module: "PipelineTrainingModule") -> list[nn.Module]:
    """The networks that `model_fn` calls, and those that roles add."""
    of_pipe = [getattr(module.pipe, name) for name in module.pipe.in_iteration_models]
    return [network for network in (*of_pipe, *role_networks(module)) if network is not None]


def laid_out_networks(module: "PipelineTrainingModule") -> list[nn.Module]:
    """The networks that the recipe applies to: those that predict, and those with trained parameters."""
    trained = [getattr(module.pipe, name) for name in module.trained_roots]
    return list(dict.fromkeys(m for m in (*predicting_networks(module), *trained) if m is not None))


def names_of(module: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """Names of these tensors among the parameters and buffers of a module."""
    wanted = set(map(id, tensors))
    named = chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in named if id(tensor) in wanted]
