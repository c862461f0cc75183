"""Read and write safetensors files, whose content is checked before any tensor is read."""

import json
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..json_text import parse_object
from ..regular import require_regular
from .foreign import shown
from .model_config import refuse_pickle

HEADER_BYTES = 100_000_000  # the longest header that the safetensors library accepts
FETCH_AGAIN = "Delete it and download it again (a git clone without LFS has pointers instead of weights)."


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        ValueError: There is no such file, it is no safetensors file, or it is not as long as its header says.
    """
    return {key: tuple(tensor["shape"]) for key, tensor in read_header(file).items()}


def read_header(file: Path) -> dict[str, dict]:
    """Shape, dtype and offsets of each tensor of a safetensors file; see `read_shapes`."""
    refuse_pickle(file)
    _require_file(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # In a cut-off or other file these bytes may be any length up to 2^64.
        if not 2 <= length <= min(size - 8, HEADER_BYTES):
            raise ValueError(f"{file} ({size} bytes) is no safetensors file, or is cut off. {FETCH_AGAIN}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON. {FETCH_AGAIN}") from error
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{file} is no safetensors file: its header lists no tensors. {FETCH_AGAIN}") from error
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, expected {expected}. {FETCH_AGAIN}")
    try:
        with safe_open(file, "pt"):  # the library checks dtypes, and that tensors neither overlap nor leave gaps
            return header
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {shown(error)}. {FETCH_AGAIN}") from error


def read_metadata(file: str | Path, key: str) -> dict[str, Any] | None:
    """The JSON object that a safetensors file's metadata has under a key; None if it has none.

    Raises:
        ValueError: The file is no safetensors file, or the text is no JSON object.
    """
    try:
        with safe_open(file, "pt") as stored:
            text = (stored.metadata() or {}).get(key)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {shown(error)}. {FETCH_AGAIN}") from error
    return None if text is None else parse_object(text, f"{file}: {key}")


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


def load_state_dict(
    path: str | Path | list[str | Path], torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Load the tensors of one or several safetensors files; floating point tensors are cast to `torch_dtype`.

    Where several files hold a tensor, the last one counts.
    """
    tensors = {}
    for file in [path] if isinstance(path, str | Path) else path:
        keys = read_shapes(Path(file))
        with safe_open(file, "pt", device=device_name(device)) as stored:
            tensors |= {key: cast(stored.get_tensor(key), torch_dtype) for key in keys}
    return tensors


def read_tensors(files: Iterable[Path], keys: Collection[str]) -> dict[str, Tensor]:
    """Some of the tensors in safetensors files, by name; the others are not read."""
    tensors = {}
    for file in files:
        wanted = [key for key in read_shapes(file) if key in keys]
        with safe_open(file, "pt") as stored:
            tensors |= {key: stored.get_tensor(key) for key in wanted}
    return tensors


def device_name(device: str | torch.device) -> str:
    """The name of a device for safetensors, which does not know `cpu:0` (the CPU device of Accelerate's processes)."""
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


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
