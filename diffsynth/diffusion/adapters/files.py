"""Adapter files: export them, load them, check them, merge them into a network.

The files that this module writes have diffusers' keys (`transformer.blocks.0.to_q.lora_A.weight`) and the adapter's
configuration as metadata; it also reads the keys of other programs.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from ...core.json_text import to_json
from ...core.loader import load_state_dict
from ...core.memory.storage import stored_layers
from .formats import FORMATS

# How much a layer that was read back may differ, relative to its largest output: guesses.
TOLERANCE = 1e-5  # in fp32, about a hundred times the rounding error 2⁻²³
HALF_TOLERANCE = 1e-2  # in bf16 and fp16, about the rounding error 2⁻⁷ of bf16
METADATA_KEY = "lora_adapter_metadata"  # key under which diffusers reads the adapter's configuration
ROUNDED_AWAY = (
    "an update that is smaller than the steps between stored numbers would be rounded away. Merge it into the unstored "
    "weights with python fuse.py lora_path=… output=…, and train on the merged weights; or load it unmerged."
)
CONFIGS = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}


def read(path: str | Path, prefix: str) -> tuple[dict[str, Tensor], dict | None]:
    """Read one model's tensors from an adapter file, under peft's names, and its configuration if the file has one.

    It reads diffusers' keys, DiffSynth-Studio's (`.lora_A.default.weight`, without a prefix), and `lora_down`/`lora_up`
    with `alpha`, whose scale alpha / rank is folded into A.

    Args:
        prefix: First part of the model's keys in LoRA files, such as `transformer`.
    """
    tensors = load_state_dict(path)
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get(METADATA_KEY)
    entries = json.loads(metadata or "{}").items()
    config = {key.removeprefix(prefix + "."): value for key, value in entries if key.startswith(prefix)}
    return peft_names(tensors, prefix), config or None


def prefixes(path: str | Path) -> set[str]:
    """The first parts of the keys in an adapter file, such as `transformer`."""
    return {key.split(".")[0] for key in load_state_dict(path)}


def peft_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One model's tensors under peft's names, from an adapter's tensors under the names of any program; see `read`."""
    return _with_peft_names(_without_prefix(tensors, prefix))


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one model; all of them if no key has a prefix."""
    others = ("pipe.dit.", "diffusion_model.") if prefix == "transformer" else ()
    for spelling in (f"{prefix}.", f"pipe.{prefix}.", *others):
        found = {key.removeprefix(spelling): value for key, value in tensors.items() if key.startswith(spelling)}
        if found:
            return found
    return dict(tensors)


def _with_peft_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    renamed = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            continue
        name = key.replace(".default.", ".").replace("lora_down.", "lora_A.").replace("lora_up.", "lora_B.")
        layer, _, is_down = name.partition(".lora_A")
        if name.endswith(".dora_scale"):
            name, value = f"{name.removesuffix('.dora_scale')}.lora_magnitude_vector", value.flatten()
        renamed[name] = value * (alphas[layer] / value.shape[0]) if is_down and layer in alphas else value
    return renamed


def check_layers(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse an adapter file whose layers the model does not have, or whose shapes do not fit the model's.

    Args:
        tensors: The file's tensors under peft's names.
        path: The file, which the error names.

    Raises:
        ValueError: The message names the key and the nearest layer.
    """
    layers = dict(module.named_modules())
    for key, value in tensors.items():
        name = re.sub(r"\.(lora|hada|lokr)_.*$", "", key)
        layer = layers.get(name)
        if layer is None or not hasattr(layer, "weight"):
            nearest = difflib.get_close_matches(name, layers, 1)
            hint = f"the nearest name is {nearest[0]!r}" if nearest else "no layer has a similar name"
            raise ValueError(
                f"{path}: {key!r} belongs to no layer of {type(module).__name__} ({hint}); choose an adapter that was "
                "made for this model."
            )
        if key.endswith("lora_A.weight") and value.dim() == 2 and value.shape[1] != layer.weight.shape[1]:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(value.shape)}, but {name} takes {layer.weight.shape[1]} features; "
                "this adapter was made for a model of another width."
            )


def load(module: nn.Module, path: str | Path, prefix: str, scale: float = 1.0, fuse: bool = False) -> None:
    """Add an adapter file to a model as a frozen adapter.

    Args:
        scale: Factor of the adapter's update.
        fuse: Merge the adapter into the model's weights instead of keeping it; the model may have no other adapter yet.

    Raises:
        ValueError: The file does not fit the model, or cannot be merged into it.
    """
    if fuse and hasattr(module, "peft_config"):
        raise ValueError(f"{path}: cannot be merged into a model that has other adapters; merge it before adding them.")
    if fuse and stored_layers(module):
        raise ValueError(f"{path} cannot be merged into weights that are stored in fewer bits: {ROUNDED_AWAY}")
    tensors, config = read(path, prefix)
    check_layers(module, tensors, path)
    config = CONFIGS[config.pop("peft_type", "LORA")](**config) if config else infer_config(tensors)
    adapter = f"lora_{len(getattr(module, 'peft_config', {}))}"
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
    module: nn.Module, prefix: str, names: str = "diffusers", adapter: str = "default"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors under the names of a format, and its configuration, which only diffusers' format stores.

    Args:
        prefix: First part of the model's keys in LoRA files, such as `transformer`.
        names: The format, a key of `formats.FORMATS`.

    Raises:
        ValueError: The format has no names for this kind of adapter.
    """
    own = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
    config = module.peft_config[adapter]
    tensors = FORMATS[names](own, config, prefix)
    entries = {f"{prefix}.{k}": _plain(v) for k, v in config.to_dict().items() if v is not None}
    return tensors, entries if names == "diffusers" else {}


def describe(module: nn.Module, adapter: str = "default") -> dict[str, str | float]:
    """Kind, rank and alpha of an adapter."""
    config = module.peft_config[adapter]
    alpha = config.lora_alpha if isinstance(config, LoraConfig) else config.alpha
    return {"kind": config.peft_type.value, "rank": config.r, "alpha": alpha}


@torch.no_grad()
def check_export(module: nn.Module, path: str | Path, prefix: str, adapter: str = "default") -> None:
    """Read an adapter file into new adapters, and compare each layer's output on noise with the trained layer's.

    Raises:
        ValueError: A tensor of the file belongs to no layer, or the outputs of a layer differ.
    """
    trained = _adapted_layers(module)
    with _evaluating(module):
        copy = _module_of({name: layer.get_base_layer() for name, layer in trained.items()})
        load(copy, path, prefix)
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


def metadata(configs: Mapping) -> dict[str, str]:
    """Metadata of a file with adapters of these configurations, which `export` returns."""
    return {METADATA_KEY: to_json(dict(configs), sort_keys=True)} if configs else {}


def infer_config(tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The configuration of a LoRA file that stores none: ranks and layers from its shapes, alpha = rank.

    Raises:
        ValueError: No tensor is a LoRA's.
    """
    down = {key: tensor for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    ranks = {key.removesuffix(".lora_A.weight"): tensor.shape[0] for key, tensor in down.items()}
    if not ranks:
        raise ValueError(
            f"No lora_A tensors among {sorted(tensors)[:3]} …; expected a LoRA file with keys such as "
            "transformer.blocks.0.to_q.lora_A.weight."
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != rank}
    dora = any("lora_magnitude_vector" in key for key in tensors)
    return LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=pattern, alpha_pattern=pattern, target_modules=list(ranks), use_dora=dora
    )


def _adapted_layers(module: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value  # JSON has no sets
