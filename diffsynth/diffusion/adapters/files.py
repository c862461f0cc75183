"""Adapter files: export them, load them, check them, merge them into a network.

`names` says what the keys of other programs mean, and `formats` what they are called in the files that are written.
"""

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ...core.json_text import to_json
from ...core.loader import load_state_dict, read_metadata, read_shapes
from ...core.memory.storage import stored_layers
from .formats import FORMATS, check_holds
from .names import LayerNames, layers_in, owner, peft_names
from .stated import METADATA_KEY, SAVED_NAMES, stated_scale
from .update import Parts, by_layer, kind, left_size, missing, rank, size, unmatched

logger = logging.getLogger(__name__)

# How much a layer that was read back may differ, relative to its largest output: guesses.
TOLERANCE = 1e-5  # in fp32, about a hundred times the rounding error 2⁻²³
HALF_TOLERANCE = 1e-2  # in bf16 and fp16, about the rounding error 2⁻⁷ of bf16
ROUNDED_AWAY = (
    "an update that is smaller than the steps between stored numbers would be rounded away. Merge it into the unstored "
    "weights with python fuse.py lora_path=… output=…, and train on the merged weights; or load it unmerged."
)
NETWORK_KEY = "diffsynth_adapter"  # of the metadata
DIFFERENCES = (".diff", ".diff_b")  # endings of ComfyUI's keys that are added to a weight or a bias as they are
LONGEST_KEY = 500  # characters of a tensor's name; a guess
# torch cannot compare or cast all the others that safetensors reads, such as complex numbers and packed 4-bit ones.
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
CONFIGS = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}


def read(path: str | Path, names: LayerNames, network: nn.Module) -> dict[str, Tensor]:
    """Read a network's tensors from an adapter file, under peft's names, with their scale folded in; needs no weights.

    The layers and ranks are those of the tensors. The adapter's configuration gives the scale alone, and a tensor
    `alpha` takes precedence.

    Args:
        path: The file, or the folder that peft or diffusers saved it in.
        names: Names of the network in adapter files.
        network: The network, which may be on the meta device.

    Raises:
        ValueError: The file is broken, has a NaN, is neither of floats nor of integers, is incomplete, or was made for
            another model.
    """
    file = find_file(path)
    if long := next((key for key in read_shapes(file) if len(key) > LONGEST_KEY), None):
        raise ValueError(
            f"{file}: the name {long[:40]!r}… has {len(long)} characters, expected at most {LONGEST_KEY}; choose the "
            "file of an adapter."
        )
    tensors = load_state_dict(file)
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            expected = f"a float or an integer, such as {torch.bfloat16}"
            raise ValueError(f"{file}: {key!r} has dtype {tensor.dtype}, expected {expected}; save it as one.")
        if not _is_finite(tensor):
            raise ValueError(f"{file}: {key!r} has values that are NaN or infinite; take an earlier export.")
    stated = stated_scale(file, names.read_as(tensors))
    found = peft_names(tensors, names, network, str(file), stated)
    check_layers(network, found, file, tensors)
    for layer, parts in by_layer(found).items():
        if lacking := missing(parts):
            raise ValueError(f"{file}: {layer} has no {lacking[0]}; the file is incomplete, fetch it again.")
    if stated is not None and stated.states_all_ranks:
        ranks = {rank(parts) for parts in by_layer(found).values()} - {None, stated.rank}
        if ranks:
            _warn_of_ranks(file, stated.rank, tuple(sorted(ranks)))
    return found


@cache  # a file is read twice: when it is checked, and when it is loaded
def _warn_of_ranks(file: Path, stated: float, ranks: tuple[int, ...]) -> None:
    logger.warning(
        "%s: its configuration states r=%d, but its tensors have rank %s, which counts: the scale is "
        "lora_alpha / rank. Correct lora_alpha there if the adapter acts too weakly or too strongly.",
        file,
        stated,
        ", ".join(map(str, ranks)),
    )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; from the extremes, which is 15 times as fast as to ask each value."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch does not order 8-bit floats
    return not tensor.numel() or all(extreme.isfinite() for extreme in values.aminmax())


def find_file(path: str | Path) -> Path:
    """The adapter file in a folder that peft or diffusers saved an adapter in; other paths are returned as they are."""
    inside = (Path(path, name) for name in SAVED_NAMES)
    return next((file for file in inside if file.is_file()), Path(path))


def prefixes(path: str | Path, known: Collection[str] = ()) -> set[str | None]:
    """Prefixes of the networks that the keys in an adapter file name; None among them if some name none.

    Args:
        known: Those of the model's networks.
    """
    return {owner(key, known) for key in read_shapes(find_file(path))}


def warn_of_unread(path: str | Path, known: Collection[str]) -> None:
    """Log a warning, once a file, of tensors in an adapter file that belong to no network of the model.

    Args:
        known: The prefixes of the model's networks.
    """
    file = find_file(path)
    unread = [key for key in read_shapes(file) if owner(key, known) not in (None, *known)]
    if unread:
        _warn_of_unread(file, len(unread), min(unread), owner(min(unread), known))


@cache
def _warn_of_unread(file: Path, count: int, key: str, network: str) -> None:
    message = "%s: %d tensors, such as %r, are of a network that this model does not have (%s), and are left out."
    logger.warning(message, file, count, key, network)


def check_layers(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, keys: Collection[str]) -> None:
    """Refuse an adapter file whose layers the model does not have, or whose shapes do not fit the model's.

    Args:
        tensors: The file's tensors under peft's names.
        path: The file, which the error names.
        keys: All keys of the file, those of other networks among them.

    Raises:
        ValueError: The message names the key as the file writes it, and the nearest layer.
    """
    if not tensors:
        raise ValueError(f"{path} has no tensor for {type(module).__name__}; choose an adapter of this model.")
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "weight")}
    found = by_layer(tensors)
    if bare := [name for name, parts in found.items() if name in layers and "" in parts]:
        raise ValueError(f"{path}: {bare[0]!r} is a layer and no part of an adapter; choose the file of an adapter.")
    if changes := [key for key in keys if key.endswith(DIFFERENCES)]:
        raise ValueError(
            f"{path}: {changes[0]!r} is a difference of weights or biases, which no adapter has here ({len(changes)} "
            "of them); take a file without them, or merge it into weights with the program that wrote it, and load "
            "these."
        )
    if unknown := [name for name in found if name not in layers]:
        key = next((key for key in keys if unknown[0] in key), unknown[0])
        hint = _nearest(unknown[0], layers)
        if owner(key) == "text_encoder" and len(unknown) == len(found):
            hint = "these layers are of another text encoder"
        raise ValueError(
            f"{path}: {key!r} belongs to no layer of {type(module).__name__} ({hint}); choose an adapter that was "
            f"made for this model: it lacks {len(unknown)} of the file's {len(layers_in(keys))} layers."
        )
    for name, parts in found.items():
        _check_shapes(name, parts, layers[name].weight.shape, path)


def _nearest(name: str, layers: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, layers, 1)
    return f"the nearest name is {nearest[0]!r}" if nearest else "no layer has a similar name"


def _check_shapes(name: str, parts: Parts, weight: torch.Size, path: str | Path) -> None:
    inputs = math.prod(weight[1:])
    for part, tensor in parts.items():
        dims, kind = (1, "vector") if part == "lora_magnitude_vector" else (2, "matrix")
        if tensor.dim() < dims or not tensor.numel():
            raise ValueError(f"{path}: '{name}.{part}' has shape {tuple(tensor.shape)}, expected a {kind}.")
    down = parts.get("lora_A.weight")
    if down is not None and down[0].numel() != inputs:
        raise ValueError(
            f"{path}: '{name}.lora_A.weight' has shape {tuple(down.shape)}, but {name} takes {inputs} features; "
            "this adapter was made for a model of another width."
        )
    if pair := unmatched(parts):
        shapes = " and ".join(f"{part} {tuple(parts[part].shape)}" for part in pair)
        raise ValueError(f"{path}: {name} has {shapes}, whose ranks differ; the file is broken, fetch it again.")
    if not missing(parts) and (found := size(parts)) != (weight[0], inputs):
        raise ValueError(
            f"{path}: the update of {name} has {found[0]} outputs and {found[1]} inputs, but the layer has {weight[0]} "
            f"and {inputs}; this adapter was made for a model of another width."
        )


def load(
    module: nn.Module,
    path: str | Path,
    names: LayerNames,
    scale: float = 1.0,
    fuse: bool = False,
    adapter: str | None = None,
) -> None:
    """Add an adapter file to a model as a frozen adapter.

    Args:
        scale: Factor of the adapter's update.
        fuse: Merge the adapter into the model's weights instead of keeping it; the model may have no other adapter yet.
        adapter: Name of the adapter; None numbers it.

    Raises:
        ValueError: The file does not fit the model, or cannot be merged into it.
    """
    if fuse and hasattr(module, "peft_config"):
        raise ValueError(f"{path}: cannot be merged into a model that has other adapters; merge it before adding them.")
    if fuse and stored_layers(module):
        raise ValueError(f"{path} cannot be merged into weights that are stored in fewer bits: {ROUNDED_AWAY}")
    tensors = read(path, names, module)
    config = infer_config(tensors, path)
    adapter = adapter or f"lora_{len(getattr(module, 'peft_config', {}))}"
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, module, adapter_name=adapter)
    fill(module, tensors, adapter, path)
    for layer in _adapted_layers(module).values():
        layer.set_adapter(list(module.peft_config))
        layer.set_scale(adapter, scale)
    module.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    if fuse:
        merge(module, adapter)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], adapter: str, path: str | Path) -> None:
    """Copy an adapter file's tensors into the adapter that is called `adapter`.

    Raises:
        ValueError: The file's rank, layers or kind differ from the adapter's.
    """
    own = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
    for key in sorted(own.keys() | tensors.keys()):
        found, expected = (tuple(side[key].shape) if key in side else "nothing" for side in (tensors, own))
        if found != expected:
            raise ValueError(
                f"{path}: {key} is {found}, the adapter has {expected}; "
                "set lora.rank and lora.target_modules to those the file was trained with."
            )
    if not any(parameter.is_meta for parameter in module.parameters()):  # a plan has shapes alone
        set_peft_model_state_dict(module, dict(tensors), adapter_name=adapter)


def merge(module: nn.Module, adapter: str) -> None:
    """Merge an adapter into the weights that it adapts, W + (α / r) B A, and remove it."""
    for name, layer in _adapted_layers(module).items():
        layer.merge(safe_merge=True, adapter_names=[adapter])
        module.set_submodule(name, layer.get_base_layer())
    del module.peft_config
    module._hf_peft_config_loaded = False


def remove(module: nn.Module) -> nn.Module:
    """Remove all adapters from a network, unmerged, and return the network."""
    for name, layer in _adapted_layers(module).items():
        module.set_submodule(name, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
        module._hf_peft_config_loaded = False
    return module


def export(
    module: nn.Module, names: LayerNames, format: str = "common", adapter: str = "default"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors under the names of a format, and its configuration, which only diffusers' format stores.

    Args:
        names: Names of the network in adapter files.
        format: A key of `formats.FORMATS`.

    Raises:
        ValueError: The format has no names for this kind of adapter.
    """
    own = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
    config = module.peft_config[adapter]
    check_holds(format, config, names.written)
    tensors = FORMATS[format](own, config, names)
    entries = {f"{names.written}.{k}": _plain(v) for k, v in config.to_dict().items() if v is not None}
    return tensors, entries if format == "diffusers" else {}


def describe(module: nn.Module, adapter: str = "default") -> dict[str, str | float]:
    """Kind, rank and alpha of an adapter."""
    config = module.peft_config[adapter]
    alpha = config.lora_alpha if isinstance(config, LoraConfig) else config.alpha
    return {"kind": config.peft_type.value, "rank": config.r, "alpha": alpha}


@torch.no_grad()
def check_export(module: nn.Module, path: str | Path, names: LayerNames, adapter: str = "default") -> None:
    """Read an adapter file into new adapters, and compare each layer's output on noise with the trained layer's.

    Raises:
        ValueError: A tensor of the file belongs to no layer, or the outputs of a layer differ.
    """
    trained = _adapted_layers(module)
    with _evaluating(module):
        copy = _module_of({name: layer.get_base_layer() for name, layer in trained.items()})
        load(copy, path, names)
        copy.eval()
        for name, layer in trained.items():
            _check_layer(copy.get_submodule(name), layer, f"{path}: read back, {name}")


def _check_layer(found: nn.Module, trained: nn.Module, what: str) -> None:
    weight = trained.get_base_layer().weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, weight.shape[1], *[8] * (weight.dim() - 2), generator=generator).to(weight)
    output, expected = found(noise), trained(noise)
    precision = TOLERANCE if weight.dtype == torch.float32 else HALF_TOLERANCE
    tolerance = precision * max(1.0, expected.abs().max().item())
    if not torch.allclose(output, expected, rtol=0, atol=tolerance):
        raise ValueError(f"{what} differs from the trained adapter by {(output - expected).abs().max().item():.2g}.")


def _module_of(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module with these layers and nothing else, under their dotted names; the layers are shared, not copied."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.add_module(last, layer)
    return root


def leave_casts_to_autocast(module: nn.Module) -> None:
    """Let the adapters of a network whose forward passes are under bf16 autocast take their input as it is.

    Otherwise peft makes an fp32 copy of every adapted layer's input, which autocast casts to bf16 again.
    """
    _cast_inputs(module, False)


@contextmanager
def casts_left_to_autocast(module: nn.Module) -> Iterator[None]:
    """Inside, `leave_casts_to_autocast`; afterwards the network can be called without autocast again."""
    leave_casts_to_autocast(module)
    try:
        yield
    finally:
        _cast_inputs(module, True)


def _cast_inputs(module: nn.Module, by_peft: bool) -> None:
    for layer in _adapted_layers(module).values():
        layer.cast_input_dtype_enabled = by_peft


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode and needs no autocast; afterwards each submodule is as it was."""
    names = ("training", "cast_input_dtype_enabled")
    states = [(part, name, getattr(part, name)) for part in module.modules() for name in names if hasattr(part, name)]
    module.eval()
    _cast_inputs(module, True)
    try:
        yield
    finally:
        for part, name, value in states:
            setattr(part, name, value)


def metadata(configs: Mapping, networks: Collection[LayerNames] = ()) -> dict[str, str]:
    """Metadata of a file with adapters of these configurations, which `export` returns.

    Args:
        networks: Names of the adapted networks; one whose keys have another's name is stated for `stated_network`.
    """
    stated = [names.prefix for names in networks if names.shared]
    own = {NETWORK_KEY: to_json({"network": stated[0]})} if stated else {}
    return own | ({METADATA_KEY: to_json(dict(configs), sort_keys=True)} if configs else {})


def stated_network(path: str | Path) -> str | None:
    """diffusers' name of the network that a file states, because its keys have another's; None if it states none."""
    return (read_metadata(find_file(path), NETWORK_KEY) or {}).get("network")


def infer_config(tensors: Mapping[str, Tensor], path: str | Path) -> PeftConfig:
    """The configuration of an adapter of scale 1 with these tensors: its kind, layers and ranks.

    Raises:
        ValueError: Layers have updates of different kinds, or Kronecker products that peft cannot build.
    """
    layers = by_layer(tensors)
    kinds = sorted({kind(parts) for parts in layers.values()})
    if len(kinds) > 1:
        raise ValueError(f"{path} has updates of the kinds {' and '.join(kinds)}; only files of one kind can be read.")
    # Whole Kronecker matrices have no rank; peft makes them whole from a rank of their size on.
    ranks = {name: rank(parts) or max(parts["lokr_w2"].shape) for name, parts in layers.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != most}
    alpha = "lora_alpha" if kinds == ["LORA"] else "alpha"
    shared = {"r": most, alpha: most, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": list(ranks)}
    if kinds == ["LORA"]:
        shared["use_dora"] = any("lora_magnitude_vector" in key for key in tensors)
    return CONFIGS[kinds[0]](**shared, **(_kronecker(layers, path) if kinds == ["LOKR"] else {}))


def _kronecker(layers: Mapping[str, Parts], path: str | Path) -> dict[str, Any]:
    """The options with which peft factors the layers' sizes as the file does.

    Raises:
        ValueError: There are none.
    """
    sizes = [(left_size(parts), size(parts)) for parts in layers.values()]
    for factor in (-1, *sorted({rows for (rows, _), _ in sizes})):
        factors = [
            (factorization(outputs, factor)[0], factorization(inputs, factor)[0]) for _, (outputs, inputs) in sizes
        ]
        if factors == [first for first, _ in sizes]:
            return {"decompose_factor": factor, "decompose_both": any("lokr_w1_a" in p for p in layers.values())}
    raise ValueError(f"{path}: peft has no decompose_factor for Kronecker products of these shapes; train with one.")


def _adapted_layers(module: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value  # JSON has no sets
