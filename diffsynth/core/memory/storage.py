"""Weights of frozen models in fewer bits than they are computed in.

| storage  | bits a weight | what is kept |
|----------|---------------|--------------|
| fp8      | 8             | e4m3 numbers, an fp32 scale for each output channel |
| fp8_cast | 8             | e4m3 numbers alone, as the original does: weights below 2⁻⁶ lose their last bits |
| int8     | 8             | whole numbers, an fp32 scale for each output channel |
| nf4      | 4.5           | quantiles of a normal distribution, an fp32 scale for each 64 weights |

nf4 is Dettmers et al. 2023, "QLoRA" (https://arxiv.org/abs/2305.14314). Weights are decoded for each product; gradients
pass through them to what was before, never to them.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import nn

from .stored_linear import StoredLinear

NARROWEST = 64  # values, of a layer's input and output: what one scale of nf4 is for
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def storable_layers(module: nn.Module, kept: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers inside a module's lists of blocks, where nearly all weights of a transformer are.

    Left as they are: norms, biases, convolutions and embeddings, which are small or no products; layers outside of the
    blocks, as the first and last projection and those of the timestep, which are a few per cent of a large model at
    most, and whose errors reach every block or the output; an output over a vocabulary, which may be the embedding
    itself; layers narrower than 64 values, such as gates.

    Args:
        kept: Parts of names of layers to leave, such as those that the library keeps in fp32.
    """
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    found = {f"{start}.{name}".lstrip("."): layer for start, part in lists for name, layer in part.named_modules()}
    return [name for name, layer in found.items() if _is_storable(layer) and not set(kept) & set(name.split("."))]


def _is_storable(layer: nn.Module) -> bool:
    # Others may have more in them than a product: only the class itself.
    return type(layer) is nn.Linear and min(layer.in_features, layer.out_features) >= NARROWEST


def store(module: nn.Module, storage: str, dtype: torch.dtype | None = None, kept: Iterable[str] = ()) -> nn.Module:
    """Keep the weights of a module's `storable_layers` by `storage` from now on, one layer after the other.

    On the meta device it makes the places that loading fills, whose sizes are those of the stored weights.
    """
    for name in storable_layers(module, kept):
        module.set_submodule(name, StoredLinear(module.get_submodule(name), storage, dtype))
    return module


def stored_layers(module: nn.Module) -> dict[str, StoredLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, StoredLinear)}


def restore(module: nn.Module) -> nn.Module:
    """Give all layers plain weights again, one after the other: what was lost in storing them stays lost."""
    for name in list(stored_layers(module)):
        layer = module.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        module.set_submodule(name, plain)
    return module


def choose_stored(
    storage: str, stored: Sequence[str] | None, models: Mapping[str, nn.Module], trained: Iterable[str]
) -> list[str]:
    """Names of the models to store, from their structure alone.

    Args:
        stored: The names asked for; None takes all models that have more weights in `storable_layers` than in
            convolutions: transformers, but no autoencoders.
        trained: Dotted names of what is trained in full.

    Raises:
        ValueError: A model there is not, or has nothing to store, or of which weights are trained; or bitsandbytes,
            which the storage needs, is not installed.
    """
    if storage == "none":
        return []
    _check_installed(storage)
    names = [name for name in sorted(models) if _is_transformer(models[name])] if stored is None else list(stored)
    for name in names:
        if name not in models:
            nearest = get_close_matches(name, models, 1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"memory.stored: there is no model {name!r}; there are {sorted(models)}.{hint}")
        if not storable_layers(models[name]):
            raise ValueError(f"memory.stored: {name} has no linear layers in blocks that memory.storage could store.")
    _refuse_trained(storage, names, trained)
    return names


def _is_transformer(module: nn.Module) -> bool:
    linear = [module.get_submodule(name) for name in storable_layers(module)]
    convolutions = [part for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    return _count(linear) > _count(convolutions)


def _count(layers: Iterable[nn.Module]) -> int:
    return sum(layer.weight.numel() for layer in layers)


def _refuse_trained(storage: str, names: Sequence[str], trained: Iterable[str]) -> None:
    for path in trained:
        if (root := path.split(".")[0]) in names:
            others = [name for name in names if name != root]
            remedy = f"memory.stored=[{','.join(others)}]" if others else "memory.storage=none"
            raise ValueError(
                f"memory.storage={storage} is for frozen weights, but {path} is trained in full. Train {root} by LoRA, "
                f"or set {remedy}."
            )


def _check_installed(storage: str) -> None:
    if storage != "nf4":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'memory.storage={storage} needs bitsandbytes: pip install "diffsynth-hydra[quant]" ({error})'
        ) from error
