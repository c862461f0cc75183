"""Store the weights of frozen models in fewer bits than the computation uses (weight-only quantization).

| storage  | bits per weight | what is stored |
|----------|-----------------|----------------|
| fp8      | 8               | e4m3 values and an fp32 scale per output channel |
| fp8_cast | 8               | e4m3 values only, as in DiffSynth-Studio: weights below 2⁻⁶ lose their last bits |
| int8     | 8               | integers and an fp32 scale per output channel |
| nf4      | 4.5             | indices of quantiles of a normal distribution and an fp32 scale per 64 weights |

nf4 is Dettmers et al. 2023, "QLoRA" (https://arxiv.org/abs/2305.14314). Weights are decoded for each product. Gradients
flow through them to the layer's input, but not to the weights, which are frozen.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import nn

from .stored_linear import StoredLinear

NARROWEST = 64  # input and output features of a layer; the number of weights that share a scale in nf4
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def storable_layers(module: nn.Module, kept: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers in a module's lists of blocks, which hold nearly all weights of a transformer.

    These keep their dtype:
    - norms, biases, convolutions and embeddings, which are small or not matrix products;
    - layers outside of the blocks, such as the first, last and timestep projections. They are a few per cent of a large
      model at most, and their errors reach every block or the output;
    - an output layer over a vocabulary, which may share its weight with the embedding;
    - layers with fewer than 64 input or output features, such as gates.

    Args:
        kept: Submodule names; layers with one of them in their path keep their dtype, such as those that the library
            keeps in fp32.
    """
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    found = {f"{start}.{name}".lstrip("."): layer for start, part in lists for name, layer in part.named_modules()}
    return [name for name, layer in found.items() if _is_storable(layer) and not set(kept) & set(name.split("."))]


def _is_storable(layer: nn.Module) -> bool:
    # Not isinstance: a subclass may compute more than a product.
    return type(layer) is nn.Linear and min(layer.in_features, layer.out_features) >= NARROWEST


def store(module: nn.Module, storage: str, dtype: torch.dtype | None = None, kept: Iterable[str] = ()) -> nn.Module:
    """Replace a module's `storable_layers` by `StoredLinear`s, one layer at a time.

    On the meta device it makes empty layers of the right size, which loading fills.

    Args:
        storage: Key of `stored_linear.METHODS`.
        dtype: Dtype that weights are decoded to; None is that of each layer.
        kept: See `storable_layers`.
    """
    for name in storable_layers(module, kept):
        module.set_submodule(name, StoredLinear(module.get_submodule(name), storage, dtype))
    return module


def stored_layers(module: nn.Module) -> dict[str, StoredLinear]:
    """The stored layers of a module by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, StoredLinear)}


def restore(module: nn.Module) -> nn.Module:
    """Replace stored layers by plain linear layers, one at a time; their rounding errors stay."""
    for name in list(stored_layers(module)):
        layer = module.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        module.set_submodule(name, plain)
    return module


def choose_stored(
    storage: str, stored: Sequence[str] | None, models: Mapping[str, nn.Module], trained: Iterable[str]
) -> list[str]:
    """Names of the models whose weights are stored by `storage`; works on the meta device.

    Args:
        stored: The names that the configuration gives. None selects the models with more weights in `storable_layers`
            than in convolutions: transformers, but not autoencoders.
        models: All models by name.
        trained: Dotted names of the modules that are trained in full.

    Raises:
        ValueError: A model does not exist, has no layers to store, or is trained in full; or bitsandbytes, which nf4
            needs, is not installed.
    """
    if storage == "none":
        return []
    if missing := what_to_install(storage):
        raise ValueError(missing)
    names = [name for name in sorted(models) if _is_transformer(models[name])] if stored is None else list(stored)
    for name in names:
        if name not in models:
            nearest = get_close_matches(name, models, 1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"memory.stored: there is no model {name!r}; expected one of {sorted(models)}.{hint}")
        if not storable_layers(models[name]):
            raise ValueError(
                f"memory.stored: {name} has no linear layers in blocks, and memory.storage={storage} stores only "
                f"those; remove {name} from memory.stored."
            )
    _refuse_trained(storage, names, trained)
    return names


def _is_transformer(module: nn.Module) -> bool:
    """Whether a module has more weights in linear layers of its blocks than in convolutions."""
    linear = [module.get_submodule(name) for name in storable_layers(module)]
    convolutions = [part for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    return _numel(linear) > _numel(convolutions)


def _numel(layers: Iterable[nn.Module]) -> int:
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


def what_to_install(storage: str) -> str | None:
    """Return what to install for a storage format, as text; None if nothing is missing."""
    if storage != "nf4":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f'memory.storage={storage} needs bitsandbytes: pip install "diffsynth-hydra[quant]" ({error})'
    return None
