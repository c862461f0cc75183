"""Adapter files that load elsewhere, and files from elsewhere that load here.

Ours hold diffusers' keys (`transformer.blocks.0.to_q.lora_A.weight`) and the adapter's configuration as metadata.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from ...core.loader import load_state_dict
from ...core.memory.storage import stored_layers
from .formats import FORMATS

TOLERANCE = 1e-5  # relative, in fp32
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's configuration
ROUNDED_AWAY = (
    "an update that is smaller than the steps of the stored numbers would be rounded away. Merge it before, by "
    "python fuse.py lora_path=… output=…, and train on what that writes; or keep it beside the weights, unmerged."
)
CONFIGS = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}


def read(path: str | Path, prefix: str) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors of one model in an adapter file, under peft's names, and its configuration if the file has it.

    Understands diffusers' keys, the original's (`.lora_A.default.weight`, no prefix), and `lora_down`/`lora_up` with
    `alpha`, whose scale alpha / rank is folded into A.
    """
    tensors = load_state_dict(path)
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get(METADATA_KEY)
    config = {k.removeprefix(prefix + "."): v for k, v in json.loads(metadata or "{}").items() if k.startswith(prefix)}
    return peft_names(tensors, prefix), config or None


def prefixes(path: str | Path) -> set[str]:
    """The first parts of the keys in an adapter file, such as `transformer`."""
    return {key.split(".")[0] for key in load_state_dict(path)}


def peft_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An adapter's tensors of one model under peft's names, from those of any file that `read` understands."""
    return _peft_names(_of_model(tensors, prefix))


def _of_model(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    spellings = (
        (f"pipe.{prefix}.", "pipe.dit.", "diffusion_model.") if prefix == "transformer" else (f"pipe.{prefix}.",)
    )
    for spelling in (f"{prefix}.", *spellings):
        mine = {key.removeprefix(spelling): value for key, value in tensors.items() if key.startswith(spelling)}
        if mine:
            return mine
    return dict(tensors)


def _peft_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    renamed = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            continue
        name = key.replace(".default.", ".").replace("lora_down.", "lora_A.").replace("lora_up.", "lora_B.")
        layer, _, part = name.partition(".lora_A")
        if name.endswith(".dora_scale"):
            name, value = f"{name.removesuffix('.dora_scale')}.lora_magnitude_vector", value.flatten()
        renamed[name] = value * (alphas[layer] / value.shape[0]) if part and layer in alphas else value
    return renamed


def check_layers(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse an adapter file whose layers the model does not have, or has in another shape."""
    layers = dict(module.named_modules())
    for key, value in tensors.items():
        name = re.sub(r"\.(lora|hada|lokr)_.*$", "", key)
        layer = layers.get(name)
        if layer is None or not hasattr(layer, "weight"):
            nearest = difflib.get_close_matches(name, layers, 1)
            raise ValueError(
                f"{path}: {key!r} belongs to no layer of {type(module).__name__} (nearest: {nearest}); "
                f"the file holds {len(tensors)} tensors of another model."
            )
        if key.endswith("lora_A.weight") and value.dim() == 2 and value.shape[1] != layer.weight.shape[1]:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(value.shape)}, but {name} takes {layer.weight.shape[1]} features; "
                "this adapter was made for a model of another width."
            )


def load(module: nn.Module, path: str | Path, prefix: str, scale: float = 1.0, fuse: bool = False) -> None:
    """Add the adapter in a file to a model, frozen; merged into its weights with `fuse`, which comes before others."""
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
    """Copy an adapter file's tensors into the adapter of that name.

    Raises:
        ValueError: The file's rank, layers or kind differ from the adapter's.
    """
    own = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
    for key in sorted(own.keys() | tensors.keys()):
        found, wanted = (tuple(d[key].shape) if key in d else "nothing" for d in (tensors, own))
        if found != wanted:
            raise ValueError(
                f"{path}: {key} is {found}, the adapter has {wanted}; "
                "set lora.rank and lora.target_modules to those the file was trained with."
            )
    set_peft_model_state_dict(module, dict(tensors), adapter_name=adapter)


def merge(module: nn.Module, adapter: str) -> None:
    """Fold an adapter into the weights it adapts and remove it: W + (α / r) B A."""
    for name, layer in _adapted_layers(module).items():
        layer.merge(safe_merge=True, adapter_names=[adapter])
        module.set_submodule(name, layer.get_base_layer())
    del module.peft_config
    module._hf_peft_config_loaded = False


def remove(module: nn.Module) -> nn.Module:
    """The network without any of its adapters."""
    for name, layer in _adapted_layers(module).items():
        module.set_submodule(name, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
        module._hf_peft_config_loaded = False
    return module


def export(
    module: nn.Module, prefix: str, names: str = "diffusers", adapter: str = "default"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors under the names of a format, and the configuration that diffusers reads beside its own.

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
    """Read an adapter file into a fresh adapter and compare what each layer makes of noise with the trained one.

    Raises:
        ValueError: A key was not used, or a layer answers differently.
    """
    trained = _adapted_layers(module)
    with _evaluating(module):
        skeleton = _skeleton({name: layer.get_base_layer() for name, layer in trained.items()})
        load(skeleton, path, prefix)
        skeleton.eval()
        for name, layer in trained.items():
            _check_layer(skeleton.get_submodule(name), layer, f"{path}: read back, {name}")


def _check_layer(found: nn.Module, trained: nn.Module, what: str) -> None:
    weight = trained.get_base_layer().weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, weight.shape[1], *[8] * (weight.dim() - 2), generator=generator).to(weight)
    answer, expected = found(noise), trained(noise)
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item()) * (1 if weight.dtype == torch.float32 else 1000)
    if not torch.allclose(answer, expected, rtol=0, atol=tolerance):
        raise ValueError(f"{what} differs from the trained adapter by {(answer - expected).abs().max().item():.2g}.")


def _skeleton(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that has nothing but these layers, under their own names; they are shared, not copied."""
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


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout inside; each part is in the mode it was in afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def metadata(configs: Mapping) -> dict[str, str]:
    """The metadata entry of a file that holds adapters of these configurations."""
    return {METADATA_KEY: json.dumps(dict(configs), sort_keys=True)} if configs else {}


def infer_config(tensors: Mapping[str, Tensor]) -> LoraConfig:
    ranks = {
        key.removesuffix(".lora_A.weight"): v.shape[0] for key, v in tensors.items() if key.endswith("lora_A.weight")
    }
    if not ranks:
        raise ValueError(
            f"No lora_A tensors among {sorted(tensors)[:3]} …; this is not a LoRA file this trainer reads."
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != rank}
    dora = any("lora_magnitude_vector" in key for key in tensors)
    return LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=pattern, alpha_pattern=pattern, target_modules=list(ranks), use_dora=dora
    )


def _adapted_layers(module: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def _plain(value):
    return sorted(value) if isinstance(value, set) else value
