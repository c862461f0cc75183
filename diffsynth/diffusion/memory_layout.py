"""A memory recipe laid on a training: what its networks cannot do is refused, then everything is put in its place."""

from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from ..core.gradient import check_policy, follow, honoured_policies
from ..core.memory.compile import check_compilable, compile_blocks
from ..core.memory.storage import choose_stored
from ..core.memory.streaming import check_streaming, stream_blocks
from .adapters import files as lora_files
from .template.model import is_below


def check_memory(module) -> None:
    """Refuse what the networks of a `PipelineTrainingModule` cannot do; works on the meta device.

    Raises:
        ValueError: Names the choice, the network, and what it can do.
    """
    recipe, pipe, runs_blocks = module.memory, module.pipe, module.task.calls_model_fn
    for name in pipe.in_iteration_models if runs_blocks else module.trained_roots:
        network = getattr(pipe, name)
        # `blocks` is what models start from, whatever of them is trained.
        if network is not None and (runs_blocks or recipe.checkpointing != "blocks"):
            check_policy(network, recipe.checkpointing)
    _check_streamed(module)
    _check_compiled(module)


def _check_streamed(module) -> None:
    pipe, count = module.pipe, module.memory.stream_blocks
    if count and not module.task.calls_model_fn:
        raise ValueError(f"memory.stream_blocks: {type(module.task).__name__} runs none that could be; set it to 0.")
    if count and pipe.network is not None:
        root = pipe.in_iteration_models[0]
        trained = [
            name.removeprefix(root).removeprefix(".") for name in module.trainable_models if is_below([root], name)
        ]
        check_streaming(pipe.network, count, trained)


def _check_compiled(module) -> None:
    if module.memory.compile == "none":
        return
    if not module.task.calls_model_fn:
        raise ValueError(f"memory.compile=blocks: {type(module.task).__name__} calls no network that has them.")
    if module.pipe.template is not None:
        raise ValueError("memory.compile=blocks: a template hands every block inputs of its own; set it to none.")
    if module.pipe.network is not None:  # that it is missing, `load` says
        check_compilable(module.pipe.network)


def stored_models(module) -> list[str]:
    """Names of the models whose weights `memory.storage` keeps in fewer bits."""
    recipe, pipe, lora = module.memory, module.pipe, module.lora
    models = {name: pipe.named_model(name) for name in pipe.built_models}
    names = choose_stored(recipe.storage, recipe.stored, models, module.trainable_models)
    if lora and lora.preset and (both := {*names} & {*lora.models}):
        raise ValueError(
            f"lora.preset cannot be merged into {min(both)}, which is stored by memory.storage={recipe.storage}: "
            f"{lora_files.ROUNDED_AWAY}"
        )
    return names


def lay_out(module) -> None:
    """Let activations and frozen weights go where the recipe says; networks are neither moved nor copied after it."""
    recipe, pipe, own = module.memory, module.pipe, role_networks(module)
    predicting = predicting_networks(module)
    for network in laid_out_networks(module):
        if recipe.checkpointing in honoured_policies(network):
            itself = network in predicting
            follow(network, recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, itself)
    if recipe.stream_blocks:
        stream = stream_blocks(pipe.network, recipe.stream_blocks, recipe.stream_buffers, pipe.device)
        for network in own:  # copies of what is in host memory
            network.to(pipe.device)
        # Never written to, they are the same in all processes, and DDP could not follow where they lie.
        module._ddp_params_and_buffers_to_ignore = names_of(module, stream.tensors)
    if recipe.compile == "blocks":
        compile_blocks(pipe.network)


def role_networks(module) -> list[nn.Module]:
    """Those that are not the pipeline's."""
    return list(module.role_networks.values()) if module.roles else []


def predicting_networks(module) -> list[nn.Module]:
    """What `model_fn` calls, and what roles have of their own."""
    of_pipe = [getattr(module.pipe, name) for name in module.pipe.in_iteration_models]
    return [network for network in (*of_pipe, *role_networks(module)) if network is not None]


def laid_out_networks(module) -> list[nn.Module]:
    """Those that follow the recipe: which predict, and of which something is trained."""
    trained = [getattr(module.pipe, name) for name in module.trained_roots]
    return list(dict.fromkeys(m for m in (*predicting_networks(module), *trained) if m is not None))


def names_of(module: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """The names that a module has for these of its parameters and buffers."""
    wanted = set(map(id, tensors))
    return [n for n, t in chain(module.named_parameters(), module.named_buffers()) if id(t) in wanted]
