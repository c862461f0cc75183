"""Load safetensors weights into a network, checked before any tensor is read."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..memory.storage import store, stored_layers
from .building import build_module
from .model_config import ModelConfig, missing_shards
from .names import Names, is_transformers, module_names, share_shape, shares, without_ones
from .safetensors_files import cast, device_name, read_header, read_shapes

FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes that torch casts to any other


def load_model(model_config: ModelConfig, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Load the model that a config names, frozen and in eval mode; its files are checked before any tensor is read."""
    files = model_config.resolve()
    module = build_module(files, model_config.config)
    check_weights(module, files)
    return load_weights(module, files, dtype, device)


class StoredTensor(NamedTuple):
    """Name, shape, dtype (as safetensors calls it: `BF16`) and file of a tensor, from the file's header."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


def check_weights(module: nn.Module, files: list[Path]) -> None:
    """Check that the names and shapes in the files' headers are those of the module; reads no tensor.

    Raises:
        ValueError: A shard is missing, a file is cut off or no safetensors file, names or shapes differ, or a tensor
            holds whole numbers where the module computes with others.
    """
    headers = {file: read_header(file) for file in files}
    if missing := missing_shards(files):
        raise ValueError(
            f"Shards missing beside {files[0]}: {', '.join(file.name for file in missing)}; download them."
        )

    names = module_names(module, [key for header in headers.values() for key in header])
    expected = dict(module.state_dict())
    found = {
        name: StoredTensor(key, _stored_shape(tensor["shape"], names[key], name, expected), tensor["dtype"], file)
        for file, header in headers.items()
        for key, tensor in header.items()
        for name in names[key]
    }
    problems = (
        _missing(module, expected, found),
        _unexpected(module, expected, found),
        _misshapen(expected, found),
        _mistyped(expected, found),
    )
    if any(problems):
        shown = [line for kind in problems for line in kind[:3]]
        hidden = sum(map(len, problems)) - len(shown)
        listed = "\n  ".join([*shown, f"and {hidden} more"] if hidden else shown)
        raise ValueError(
            f"The weights in {files[0].parent} do not fit {type(module).__name__}:\n  {listed}\n"
            "Are they of another architecture or size? Use the config.json that was released with them."
        )


def _stored_shape(shape: Sequence[int], names: Names, name: str, expected: Mapping) -> tuple[int, ...]:
    """The shape of a name's share of a stored tensor."""
    share = share_shape(shape, len(names))
    return without_ones(share, expected[name].dim()) if name in expected and len(share) > 1 else share


def _missing(module: nn.Module, expected: Mapping, found: Mapping) -> list[str]:
    # Files contain one of several tied weights; transformers lists them as {target: source}.
    tied = getattr(module, "all_tied_weights_keys", {})
    present = {tied.get(name, name) for name in found}
    return [f"{name} is missing" for name in expected if tied.get(name, name) not in present]


def _unexpected(module: nn.Module, expected: Mapping, found: Mapping) -> list[str]:
    ignored = re.compile("|".join(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"]))
    unexpected = [name for name in found if name not in expected and not ignored.search(name)]
    problems = [f"{found[name].key} in {found[name].file} is unexpected" for name in unexpected]
    if unexpected and (nearest := get_close_matches(unexpected[0], expected, 1)):
        problems[0] += f" (nearest: {nearest[0]})"
    return problems


def _misshapen(expected: Mapping, found: Mapping) -> list[str]:
    return [
        f"{tensor.key} in {tensor.file} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != tuple(expected[name].shape)
    ]


def _mistyped(expected: Mapping, found: Mapping) -> list[str]:
    return [
        f"{tensor.key} in {tensor.file} has dtype {tensor.dtype}, expected one with fractions, such as BF16"
        for name, tensor in found.items()
        if name in expected and expected[name].is_floating_point() and tensor.dtype not in FRACTIONS
    ]


def load_weights(
    module: nn.Module,
    files: list[Path] | None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    storage: str = "none",
) -> nn.Module:
    """Load memory-mapped weights into a module, frozen and in eval mode.

    Tensors are cast one at a time, and not copied if dtype and device agree. Peak memory is the model and one tensor,
    besides the mapped pages of one shard, which the kernel drops when it needs memory. Integer tensors are not cast.
    Submodules that the library keeps in fp32 become fp32.

    Args:
        files: The safetensors files; None for a plan's module, whose tensors have no values (see `empty_weights`).
        dtype: Dtype of the weights; None is that of the files.
        storage: Format of the weights of linear layers in blocks, see `core.memory.storage`.

    Raises:
        ValueError: A parameter is in no file.
    """
    in_fp32 = _fp32_names(module, dtype)
    if storage != "none":
        store(module, storage, dtype, kept=in_fp32)
    if files is None:
        return empty_weights(module, dtype, device)
    keys = {file: list(read_shapes(file)) for file in files}
    names = module_names(module, [key for stored in keys.values() for key in stored])
    layers = {f"{name}.weight": layer for name, layer in stored_layers(module).items()}
    expected = module.state_dict()
    absent = set(expected)
    for file in files:
        state = {}
        with safe_open(file, "pt", device=device_name(device)) as tensors:
            for key in [key for key in keys[file] if names[key]]:
                for name, tensor in zip(names[key], shares(tensors.get_tensor(key), len(names[key])), strict=True):
                    if name in layers:
                        state |= _encoded(layers[name], name, tensor)
                    elif name in absent:
                        wanted = torch.float32 if in_fp32 & set(name.split(".")) else dtype
                        state[name] = cast(tensor.reshape(expected[name].shape), wanted)
        module.load_state_dict(state, assign=True, strict=False)
        absent -= state.keys()
    if hasattr(module, "tie_weights"):
        module.tie_weights(missing_keys=absent)
    unloaded = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if unloaded:
        raise ValueError(
            f"{len(unloaded)} parameters of {type(module).__name__} are in none of the files, such as {unloaded[0]}; "
            "download the weights again, or use the config.json that was released with them."
        )
    return module.to(device).requires_grad_(False).eval()


def empty_weights(module: nn.Module, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """Give a module weights and buffers of the right shapes and dtypes, but without values (`torch.empty`)."""
    in_fp32 = _fp32_names(module, dtype)
    for path, part in module.named_modules():
        for name, tensor in part.named_parameters(recurse=False):
            wanted = torch.float32 if in_fp32 & {*path.split("."), name} else dtype
            empty = torch.empty_like(cast(tensor, wanted), device=device)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        for name, tensor in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty_like(tensor, device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.eval()


def _encoded(layer: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The state of a stored layer, whose weight would be called `name`."""
    start = name.removesuffix("weight")
    return {f"{start}{part}": tensor for part, tensor in layer.encode(weight).items()}


def drop_weights(module: nn.Module) -> None:
    """Free a module's parameters: they are meta tensors again. Buffers, which the constructor computed, stay."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _fp32_names(module: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Names of the submodules that the library keeps in fp32 when the model is cast to `dtype`."""
    if dtype is None:
        return set()
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # In transformers the other list is for fp16 only, whose range is too small.
    if not is_transformers(module) or dtype == torch.float16:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names
