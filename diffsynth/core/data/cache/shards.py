"""Pack cache entries into safetensors files (shards), each named by the hash of its bytes.

A file can therefore be verified without an index, and processes never write different files of one name. A shard's
metadata lists its entries. For each it has the layout, which says how to build the entry from tensors and plain values,
and a digest, which tells the intact entries of a damaged file.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ...files import digest_of, replacing
from .mapped import MappedTensors

Entry = dict[str, Any]  # tensors, images, lists of either, and JSON values, by name
Tensors = dict[str, Tensor]

LISTING = "entries"  # key of a shard's metadata that lists the entries
# Errors that reading a malformed file can raise; RecursionError is from JSON that is nested too deeply.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError)


class DamagedShard(ValueError):
    """A shard is damaged; the message says how, and how to repair it."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path} {fault}; python make_cache.py with the same options replaces damaged entries.")


class Shard:
    """One memory-mapped file of entries."""

    def __init__(self, path: Path):
        self.path = path
        self._verified: set[str] = set()

    @cached_property
    def _file(self) -> MappedTensors:
        try:
            return MappedTensors(self.path)
        except (OSError, SafetensorError) as error:
            raise DamagedShard(self.path, f"cannot be read: {error}") from error

    @cached_property
    def contents(self) -> dict[str, dict]:
        """The layout and digest of each entry, by key.

        Raises:
            DamagedShard: The file cannot be read, or lists no entries.
        """
        metadata = self._file.metadata
        try:
            return dict(json.loads(metadata[LISTING]).items())
        except MALFORMED as error:
            raise DamagedShard(self.path, f"lists no entries: {error!r}") from error

    def read(self, key: str) -> Entry:
        """The entry of a key, compared with its digest when it is read for the first time.

        Raises:
            DamagedShard: The file cannot be read, holds no such entry, or another than was written.
        """
        contents = self.contents
        try:
            layout = contents[key]["layout"]
            entry = {name: _put_together(part, self._tensors(key, part)) for name, part in layout.items()}
        except MALFORMED as error:
            raise DamagedShard(self.path, f"does not hold {key}: {error!r}") from error
        if key not in self._verified:
            if not self._is_whole(key):
                raise DamagedShard(self.path, f"is damaged: the entry {key} differs from its checksum")
            self._verified.add(key)
        return entry

    def _tensors(self, key: str, part: dict) -> Tensors:
        return {name: self._file[f"{key}/{name}"] for name in _names(part)}

    def is_whole(self) -> bool:
        """Whether the hash of the file's bytes equals its name."""
        return digest_of(self.path) == self.path.stem

    def whole_entries(self) -> set[str]:
        """Keys of the intact entries of a file that may be damaged."""
        try:
            return {key for key in self.contents if self._is_whole(key)}
        except DamagedShard:
            return set()

    def _is_whole(self, key: str) -> bool:
        try:
            layout, digest = (self.contents[key][name] for name in ("layout", "digest"))
            tensors: Tensors = {}
            for part in layout.values():
                tensors |= self._tensors(key, part)
            return _digest_of_entry(key, layout, tensors) == digest
        except MALFORMED:
            return False


class ShardWriter:
    """Packs entries into shards, which a thread writes while the next entries are being made.

    Args:
        folder: Folder of the shards.
        shard_bytes: Approximate size of a shard in bytes; the default is a guess.
        seconds: Longest time that entries wait for their shard to fill up; a kill loses at most this much work. The
            default is a guess.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2**28, seconds: float = 600):
        self.folder, self.shard_bytes, self.seconds = Path(folder), shard_bytes, seconds
        self.written: set[Path] = set()
        self._entries: dict[str, tuple[dict, Tensors]] = {}
        self._size, self._began = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def add(self, key: str, entry: Entry) -> None:
        """Add an entry, which is written when its shard is full or the `with` block ends."""
        tensors: Tensors = {}
        layout = {name: _take_apart(value, name, tensors) for name, value in entry.items()}
        self._entries[key] = layout, tensors
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        if self._size >= self.shard_bytes or time.monotonic() - self._began >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the entries that are waiting."""
        self._wait()  # one file at a time, so that at most two shards are in memory
        if self._entries:
            self._writing = self._thread.submit(_write_shard, self.folder, self._entries)
        self._entries, self._size, self._began = {}, 0, time.monotonic()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.written.add(writing.result())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        """Write all entries, also those that were complete before an error, and wait for the disk."""
        try:
            self.flush()
            self._wait()
        finally:
            self._thread.shutdown()


def rewrite(shards: Iterable[Shard], keep: set[str], shard_bytes: int = 2**28) -> list[Path]:
    """Pack the entries of the keys `keep` into new shards, each once; return the old ones, which nothing needs now."""
    shards, kept = list(shards), set()
    folder = shards[0].path.parent
    with ShardWriter(folder, shard_bytes) as writer:
        for shard in shards:
            for key in sorted((shard.whole_entries() & keep) - kept):
                writer.add(key, shard.read(key))
                kept.add(key)
    # A new shard with the same entries has the same name.
    return [shard.path for shard in shards if shard.path not in writer.written]


def _write_shard(folder: Path, entries: Mapping[str, tuple[dict, Tensors]]) -> Path:
    """Write one file of entries atomically; return its path."""
    tensors, contents = {}, {}
    for key, (layout, by_name) in sorted(entries.items()):
        contents[key] = {"layout": layout, "digest": _digest_of_entry(key, layout, by_name)}
        tensors |= {f"{key}/{name}": tensor for name, tensor in by_name.items()}
    data = save(tensors, {LISTING: json.dumps(contents, sort_keys=True)})
    path = folder / f"{_new_digest(data).hexdigest()}.safetensors"
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path


# A part of an entry's layout is {"tensor": name}, {"image": name}, {"list": parts} or {"plain": value}.


def _take_apart(value: Any, name: str, tensors: Tensors) -> dict:
    """The layout of a value; its tensors and images are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # a copy, as it may be a view of a batch
        return {"tensor": name}
    if isinstance(value, Image.Image):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"image": name}
    if not isinstance(value, list | tuple):
        return {"plain": value}
    parts = [_take_apart(element, f"{name}/{number}", tensors) for number, element in enumerate(value)]
    return {"plain": list(value)} if all("plain" in part for part in parts) else {"list": parts}


def _put_together(part: Mapping, tensors: Tensors) -> Any:
    """The value of a layout."""
    ((kind, value),) = part.items()
    make: dict[str, Callable] = {
        "tensor": tensors.__getitem__,
        "image": lambda name: Image.fromarray(tensors[name].numpy()),
        "list": lambda parts: [_put_together(element, tensors) for element in parts],
        "plain": lambda plain: plain,
    }
    return make[kind](value)


def _names(part: Mapping) -> list[str]:
    """Names of the tensors in a part of a layout."""
    if "list" in part:
        return [name for element in part["list"] for name in _names(element)]
    return [part[kind] for kind in ("tensor", "image") if kind in part]


def _new_digest(data: bytes = b"") -> blake2b:
    return blake2b(data, digest_size=16)


def _digest_of_entry(key: str, layout: Mapping, tensors: Tensors) -> str:
    digest = _new_digest(json.dumps([key, layout], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
