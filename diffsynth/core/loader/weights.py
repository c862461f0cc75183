import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replacing
from ..memory.storage import store, stored_layers
from .model_config import ModelConfig, missing_shards, refuse_pickle

FINGERPRINT_BLOCKS, FINGERPRINT_BYTES = 64, 4096


def load_model(model_config: ModelConfig, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """The model a config names, frozen and in eval mode, its weights checked before any is read."""
    files = model_config.resolve()
    module = build_module(files, model_config.config)
    check_weights(module, files)
    return load_weights(module, files, dtype, device)


def build_module(
    files: list[Path] | None,
    config: str | Path | Mapping | None = None,
    classes: Mapping[str, type[nn.Module]] | None = None,
) -> nn.Module:
    """An empty module of the class that config.json names, from diffusers or transformers.

    Parameters are on the meta device; buffers and plain tensors (RoPE tables) are computed by the constructor.

    Args:
        files: The weights; config.json is looked for beside the first.
        config: Another config.json, or its folder, or its content.
        classes: By the name in config.json, classes to build instead of the library's.
    """
    from accelerate import init_empty_weights

    config_file = "config" if isinstance(config, Mapping) else _find_config(Path(config or files[0].parent))
    config = config if isinstance(config, Mapping) else json.loads(config_file.read_text())
    network = (classes or {}).get(config.get("_class_name")) or _network_class(config, config_file)
    with init_empty_weights(include_buffers=False):
        if "_class_name" in config:
            return network.from_config(config)
        return network(network.config_class.from_dict(config))


def _find_config(path: Path) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.absolute()} not found, and the weights' class stands in it. "
            "Put the released config.json beside the weights, or pass config= with its path."
        )
    return file


def _network_class(config: Mapping, config_file: Path | str) -> type[nn.Module]:
    import diffusers
    import transformers

    if "_class_name" in config:
        library, name = diffusers, config["_class_name"]
    elif config.get("architectures"):
        library, name = transformers, config["architectures"][0]
    else:
        raise ValueError(
            f"{config_file} names no class. Expected _class_name (diffusers) or architectures (transformers) in it."
        )
    network = getattr(library, name, None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        nearest = get_close_matches(name, dir(library), 1)
        raise ValueError(
            f"{config_file} names {name!r}, which is no network of {library.__name__} {library.__version__}. "
            f"Nearest: {', '.join(nearest) or 'none'}. A newer release may have it."
        )
    return network


class StoredTensor(NamedTuple):
    """A tensor as a file's header describes it."""

    key: str
    shape: tuple[int, ...]
    file: Path


def check_weights(module: nn.Module, files: list[Path]):
    """Compare the files' headers with the module; reads no tensor.

    Raises:
        ValueError: A shard is missing, a file is cut off or no safetensors, or names or shapes differ.
    """
    shapes = {file: read_shapes(file) for file in files}
    if missing := missing_shards(files):
        raise ValueError(f"Shards missing beside {files[0]}: {', '.join(file.name for file in missing)}. Fetch them.")

    names = _module_keys(module, [key for header in shapes.values() for key in header])
    found = {
        names[key]: StoredTensor(key, shape, file) for file, header in shapes.items() for key, shape in header.items()
    }
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    problems = (_missing(module, expected, found), _unexpected(module, expected, found), _misshapen(expected, found))
    if any(problems):
        shown = [line for kind in problems for line in kind[:3]]
        hidden = sum(map(len, problems)) - len(shown)
        listed = "\n  ".join([*shown, f"and {hidden} more"] if hidden else shown)
        raise ValueError(
            f"The weights do not fit {type(module).__name__}:\n  {listed}\n"
            "Are they of another architecture or size? Give the config.json released with them."
        )


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header.

    Raises:
        ValueError: The file is no safetensors or not as long as its header says.
    """
    refuse_pickle(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # A cut or foreign file announces any length, up to 2^64.
        if not 2 <= length <= size - 8:
            raise ValueError(f"{file} ({size} bytes) is no safetensors file, or is cut off. {_FETCH_AGAIN}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON. {_FETCH_AGAIN}") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, expected {expected}. {_FETCH_AGAIN}")
    return {key: tuple(tensor["shape"]) for key, tensor in header.items()}


_FETCH_AGAIN = "Delete it and fetch it again (a git clone without LFS leaves pointers instead of weights)."


def _missing(module: nn.Module, expected: Mapping, found: Mapping) -> list[str]:
    # Of tied weights files hold one: {target: source} in transformers.
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
        f"{tensor.key} in {tensor.file} has shape {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name]
    ]


def load_weights(
    module: nn.Module,
    files: list[Path] | None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    storage: str = "none",
) -> nn.Module:
    """Assign memory-mapped weights to a module, frozen and in eval mode.

    Tensors are cast one at a time; where dtype and device agree nothing is copied. Peak memory is the model and one
    tensor, besides the mapped pages of one shard, which the kernel drops when it needs to. Integers are not cast, and
    what the library keeps in fp32 becomes fp32.

    Args:
        files: None of a sketch, which has no values: its weights are left as `torch.empty` makes them.
        storage: How the weights of linear layers in blocks are kept, see `core.memory.storage`; also one at a time.
    """
    in_fp32 = _fp32_names(module, dtype)
    if storage != "none":
        store(module, storage, dtype, kept=in_fp32)
    if files is None:
        return empty_weights(module, dtype, device)
    keys = {file: list(read_shapes(file)) for file in files}
    names = _module_keys(module, [key for stored in keys.values() for key in stored])
    layers = {f"{name}.weight": layer for name, layer in stored_layers(module).items()}
    absent = set(module.state_dict())
    for file in files:
        state = {}
        with safe_open(file, "pt", device=_device_name(device)) as tensors:
            for key in keys[file]:
                name = names[key]
                if name in layers:
                    state |= _encoded(layers[name], name, tensors.get_tensor(key))
                elif name in absent:
                    wanted = torch.float32 if in_fp32 & set(name.split(".")) else dtype
                    state[name] = _cast(tensors.get_tensor(key), wanted)
        module.load_state_dict(state, assign=True, strict=False)
        absent -= state.keys()
    if hasattr(module, "tie_weights"):
        module.tie_weights(missing_keys=absent)
    unloaded = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if unloaded:
        raise ValueError(f"{len(unloaded)} parameters of {type(module).__name__} are in no file, as {unloaded[0]}.")
    return module.to(device).requires_grad_(False).eval()


def empty_weights(module: nn.Module, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """Weights and buffers of a module in their shapes and dtypes, without values."""
    in_fp32 = _fp32_names(module, dtype)
    for path, part in module.named_modules():
        for name, tensor in part.named_parameters(recurse=False):
            kept = torch.float32 if in_fp32 & {*path.split("."), name} else dtype
            empty = torch.empty_like(_cast(tensor, kept), device=device)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        for name, tensor in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty_like(tensor, device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.eval()


def _encoded(layer: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    start = name.removesuffix("weight")
    return {f"{start}{part}": tensor for part, tensor in layer.encode(weight).items()}


def drop_weights(module: nn.Module) -> None:
    """Let go of a module's parameters, as before they were loaded; buffers, which its constructor computed, stay."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _device_name(device: str | torch.device) -> str:
    """What safetensors calls a device: it knows no `cpu:0`, which processes on one CPU are given."""
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _fp32_names(module: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Names of submodules whose weights stay fp32 when the model is cast to `dtype`."""
    if dtype is None:
        return set()
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # In transformers the other list guards against the range of fp16 only.
    if not _is_transformers(module) or dtype == torch.float16:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names


def _is_transformers(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _module_keys(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Each released key and its name in the module: transformers renames modules, its checkpoints stay as released."""
    if not _is_transformers(module):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(module) if isinstance(rule, WeightRenaming)]
    expected = module.state_dict()
    names = {key: rename_source_key(key, rules, [], module.base_model_prefix, expected)[0] for key in keys}
    # What to_released_keys reverts; from_pretrained leaves the same.
    module._weight_conversions = [rule for rule in rules if rule.was_used()]
    return names


def to_released_keys(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's weights under the names of the checkpoint it was loaded from, or of the released ones if it is new."""
    if not _is_transformers(module):
        return state_dict
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(module, state_dict)


def load_state_dict(
    path: str | Path | list[str | Path], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or of several."""
    tensors = {}
    for file in [path] if isinstance(path, str | Path) else path:
        keys = read_shapes(Path(file))
        with safe_open(file, "pt", device=_device_name(device)) as stored:
            tensors |= {key: _cast(stored.get_tensor(key), dtype) for key in keys}
    return tensors


def save_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None):
    """Write a safetensors file, all of it or nothing."""
    with replacing(path) as partial:
        save_file(_without_overlap(tensors), partial, metadata)


def _without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors asks."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    end = 0
    for key, tensor in sorted(contiguous.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            contiguous[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return contiguous


def fingerprint(files: Sequence[Path], config: str | Path | None = None) -> str:
    """16 hex digits of weights: their config.json, their tensors' names and shapes, and a sample of their bytes.

    Reading all of a large model would take minutes; another training of it differs nearly everywhere.
    """
    digest = blake2b(_find_config(Path(config or files[0].parent)).read_bytes(), digest_size=8)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header))
            for offset in range(8 + header, size, max(1, (size - 8 - header) // FINGERPRINT_BLOCKS)):
                stream.seek(offset)
                digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """16 hex digits of the small files in a folder, such as a tokenizer's."""
    digest = blake2b(digest_size=8)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
