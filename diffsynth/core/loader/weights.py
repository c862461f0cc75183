"""Build a network from its config.json and load safetensors weights into it, checked before any tensor is read."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules import module as registration

from ..files import replacing
from ..memory.storage import store, stored_layers
from ..regular import require_regular
from .foreign import read_object, shown
from .model_config import ModelConfig, missing_shards, refuse_pickle

# Blocks that `fingerprint` reads of each file, and their size in bytes; guesses.
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BYTES = 4096
FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes that torch casts to any other
HEADER_BYTES = 100_000_000  # the longest header that the safetensors library accepts
# Modules and parameters that a network may have: so many for each tensor of its files, and some more; guesses. Building
# 20,000 takes seconds, and three million layers, of which a damaged config.json may speak, would take hours.
PER_TENSOR, MOST_PARTS = 4, 20_000
LARGEST = 1 << 27  # a whole number in a config.json, except bases of RoPE (theta): it may be the length of a table


def load_model(model_config: ModelConfig, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Load the model that a config names, frozen and in eval mode; its files are checked before any tensor is read."""
    files = model_config.resolve()
    module = build_module(files, model_config.config)
    check_weights(module, files)
    return load_weights(module, files, dtype, device)


def build_module(
    files: list[Path] | None,
    config: str | Path | Mapping | None = None,
    classes: Mapping[str, type[nn.Module]] | None = None,
) -> nn.Module:
    """Build a module without weights, of the diffusers or transformers class that config.json names.

    Parameters are on the meta device; the constructor computes buffers and plain tensors (RoPE tables).

    Args:
        files: The weights; config.json is expected beside the first file.
        config: Another config.json, its folder, or its content.
        classes: Classes to build instead of the library's, by the class name in config.json.
    """
    from accelerate import init_empty_weights

    config_file = "config" if isinstance(config, Mapping) else _find_config(Path(config or files[0].parent))
    config = config if isinstance(config, Mapping) else _read_config(config_file)
    name = str(config.get("_class_name"))
    network = (classes or {}).get(name) or _network_class(config, config_file)
    most = MOST_PARTS + PER_TENSOR * sum(len(read_shapes(file)) for file in files or ())
    try:
        with _at_most(most), init_empty_weights(include_buffers=False):
            if "_class_name" in config:
                return network.from_config(config)
            return network(network.config_class.from_dict(config))
    except Exception as error:  # constructors raise errors of nearly any class for a value that they do not expect
        raise ValueError(
            f"{config_file}: no {network.__name__} can be built of it: {shown(error)}. Use the config.json that was "
            "released with the weights."
        ) from error


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Inside, a module that gets more than `most` submodules and parameters raises an error."""
    count = 0

    def register(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most} modules and parameters, its files too few tensors for that")

    handles = [
        registration.register_module_module_registration_hook(register),
        registration.register_module_parameter_registration_hook(register),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_config(file: Path) -> dict:
    config = read_object(file)
    if large := next(_too_large(config), None):
        name, value = large
        raise ValueError(
            f"{file}: {name} is {value}, expected at most {LARGEST}. Use the config.json that was released with the "
            "weights."
        )
    return config


def _too_large(value: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Name and value of each whole number in a config that cannot be the size of anything."""
    if isinstance(value, dict | list):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _too_large(element, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int) and abs(value) > LARGEST and "theta" not in name:
        yield name, value


def _find_config(path: Path) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.absolute()} not found; it names the class of the weights. "
            "Put the released config.json beside the weights, or pass config= with its path."
        )
    return file


def _network_class(config: Mapping, config_file: Path | str) -> type[nn.Module]:
    import diffusers
    import transformers

    library, names = transformers, config.get("architectures")
    if "_class_name" in config:
        library, names = diffusers, [config["_class_name"]]
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ValueError(
            f"{config_file} names no class. Expected _class_name (diffusers) or architectures (transformers) in it; "
            "use the config.json that was released with the weights."
        )
    name = names[0]
    network = getattr(library, name, None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        nearest = get_close_matches(name, dir(library), 1)
        raise ValueError(
            f"{config_file} names {name!r:.99}, which is no network of {library.__name__} {library.__version__}. "
            f"Nearest: {', '.join(nearest) or 'none'}. A newer release may have it: pip install -U {library.__name__}"
        )
    return network


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
    headers = {file: _read_header(file) for file in files}
    if missing := missing_shards(files):
        raise ValueError(
            f"Shards missing beside {files[0]}: {', '.join(file.name for file in missing)}; download them."
        )

    names = _module_keys(module, [key for header in headers.values() for key in header])
    found = {
        names[key]: StoredTensor(key, tuple(tensor["shape"]), tensor["dtype"], file)
        for file, header in headers.items()
        for key, tensor in header.items()
    }
    expected = dict(module.state_dict())
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


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        ValueError: There is no such file, it is no safetensors file, or it is not as long as its header says.
    """
    return {key: tuple(tensor["shape"]) for key, tensor in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, dict]:
    """Shape, dtype and offsets of each tensor of a safetensors file; see `read_shapes`."""
    refuse_pickle(file)
    _require_file(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # In a cut-off or other file these bytes may be any length up to 2^64.
        if not 2 <= length <= min(size - 8, HEADER_BYTES):
            raise ValueError(f"{file} ({size} bytes) is no safetensors file, or is cut off. {_FETCH_AGAIN}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON. {_FETCH_AGAIN}") from error
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{file} is no safetensors file: its header lists no tensors. {_FETCH_AGAIN}") from error
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, expected {expected}. {_FETCH_AGAIN}")
    try:
        with safe_open(file, "pt"):  # the library checks dtypes, and that tensors neither overlap nor leave gaps
            return header
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {shown(error)}. {_FETCH_AGAIN}") from error


def read_metadata(file: str | Path, key: str) -> dict[str, Any] | None:
    """The JSON object that a safetensors file's metadata has under a key; None if it has none.

    Raises:
        ValueError: The file is no safetensors file, or the text is no JSON object.
    """
    try:
        with safe_open(file, "pt") as stored:
            text = (stored.metadata() or {}).get(key)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {shown(error)}. {_FETCH_AGAIN}") from error
    return None if text is None else parse_object(text, f"{file}: {key}")


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse JSON that should be an object.

    Raises:
        ValueError: It is no JSON, or another value; the message begins with `source`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter if it is nested too deeply
        raise ValueError(f"{source} is no JSON: {text[:40]!r}; make the file anew, or take another.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is {text[:40]!r}, expected a JSON object; make the file anew, or take another.")
    return value


def _require_file(file: Path) -> None:
    """Raise ValueError if there is no such file; for a run's folder, the error names its newest weights."""
    if file.is_dir():
        inside = [path for pattern in ("*", "weights/*", "*/weights/*") for path in file.glob(f"{pattern}.safetensors")]
        newest = max(inside, key=lambda path: path.stat().st_mtime, default="….safetensors")
        raise ValueError(f"{file} is a folder; expected a file, such as {newest}.")
    if not file.exists():
        names = [path.name for path in file.parent.glob("*.safetensors")]
        near = [str(file.with_name(name)) for name in get_close_matches(file.name, names, 1)]
        hint = f"did you mean {near[0]}?" if near else "expected a .safetensors file."
        raise ValueError(f"{file} does not exist; {hint}")
    require_regular(file)


_FETCH_AGAIN = "Delete it and download it again (a git clone without LFS has pointers instead of weights)."


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
            empty = torch.empty_like(_cast(tensor, wanted), device=device)
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


def _device_name(device: str | torch.device) -> str:
    """The name of a device for safetensors, which does not know `cpu:0` (the CPU device of Accelerate's processes)."""
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _fp32_names(module: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Names of the submodules that the library keeps in fp32 when the model is cast to `dtype`."""
    if dtype is None:
        return set()
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # In transformers the other list is for fp16 only, whose range is too small.
    if not _is_transformers(module) or dtype == torch.float16:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names


def _is_transformers(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _module_keys(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The name in the module of each key of the files; they differ where transformers has renamed modules since."""
    if not _is_transformers(module):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(module) if isinstance(rule, WeightRenaming)]
    expected = module.state_dict()
    names = {key: rename_source_key(key, rules, [], module.base_model_prefix, expected)[0] for key in keys}
    # to_released_keys reverts these; from_pretrained sets the same attribute.
    module._weight_conversions = [rule for rule in rules if rule.was_used()]
    return names


def to_released_keys(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights, of any shape, to the names of the checkpoint that the module was loaded from.

    A module that was not loaded gets the names of its class's released checkpoints.
    """
    if not _is_transformers(module):
        return state_dict
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(module, state_dict)


def load_state_dict(
    path: str | Path | list[str | Path], torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Load the tensors of one or several safetensors files; floating point tensors are cast to `torch_dtype`.

    Where several files hold a tensor, the last one counts.
    """
    tensors = {}
    for file in [path] if isinstance(path, str | Path) else path:
        keys = read_shapes(Path(file))
        with safe_open(file, "pt", device=_device_name(device)) as stored:
            tensors |= {key: _cast(stored.get_tensor(key), torch_dtype) for key in keys}
    return tensors


def save_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    with replacing(path) as partial:
        try:
            save_file(_without_overlap(tensors), partial, metadata)
        except SafetensorError as error:  # the library's own class, whatever the disk says
            if "I/O error" not in str(error):
                raise
            raise OSError(f"{path} cannot be written: {error}") from error


def _without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors requires."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    end = 0
    for key, tensor in sorted(contiguous.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            contiguous[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return contiguous


def fingerprint(files: Sequence[Path], config: str | Path | None = None) -> str:
    """A hash (16 hex digits) of weights: of config.json, the tensors' names and shapes, and some of their bytes.

    Reading all of a large model would take minutes, and any further training changes nearly every weight.
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
    """A hash (16 hex digits) of the files in a folder, such as a tokenizer's."""
    digest = blake2b(digest_size=8)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
