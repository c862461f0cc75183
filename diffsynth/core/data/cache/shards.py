"""Entries packed into safetensors files, each named by the digest of its own bytes.

So a file proves itself without any index, and no two processes ever write the same name. A shard's metadata lists its
entries: how each is put together from its tensors and plain values, and a digest of it, which tells the good ones of a
damaged file.
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

Entry = dict[str, Any]  # tensors, images, lists of them, and plain values, by name
Tensors = dict[str, Tensor]

LISTING = "entries"  # of a shard's metadata
# What comes of a file that anyone may have written; a RecursionError of JSON that is nested without end.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError)


class DamagedShard(ValueError):
    """A shard that is not what was written; the message says in what, and how to mend it."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path} {fault}; python make_cache.py with the same options replaces what is damaged.")


class Shard:
    """One file of entries, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _file(self) -> MappedTensors:
        try:
            return MappedTensors(self.path)
        except (OSError, SafetensorError) as error:
            raise DamagedShard(self.path, f"cannot be read: {error}") from error

    @cached_property
    def contents(self) -> dict[str, dict]:
        """What the file says of each entry, by key.

        Raises:
            DamagedShard: The file cannot be read, or does not say.
        """
        metadata = self._file.metadata
        try:
            return dict(json.loads(metadata[LISTING]).items())
        except MALFORMED as error:
            raise DamagedShard(self.path, f"lists no entries: {error!r}") from error

    def read(self, key: str) -> Entry:
        """One entry.

        Raises:
            DamagedShard: The file cannot be read, or holds no such entry.
        """
        contents = self.contents
        try:
            layout = contents[key]["layout"]
            return {name: _put_together(part, self._tensors(key, part)) for name, part in layout.items()}
        except MALFORMED as error:
            raise DamagedShard(self.path, f"does not hold {key}: {error!r}") from error

    def _tensors(self, key: str, part: dict) -> Tensors:
        return {name: self._file[f"{key}/{name}"] for name in _names(part)}

    def is_whole(self) -> bool:
        """Whether the file's bytes are those that were written."""
        return digest_of(self.path) == self.path.stem

    def whole_entries(self) -> set[str]:
        """Keys of the entries that are as they were written, in a file that may not be whole."""
        try:
            return {key for key in self.contents if self._is_whole(key)}
        except DamagedShard:
            return set()

    def _is_whole(self, key: str) -> bool:
        try:
            layout, digest = (self.contents[key][name] for name in ("layout", "digest"))
            parts = [self._tensors(key, part) for part in layout.values()]
            return _digest_of_entry(key, layout, {n: t for part in parts for n, t in part.items()}) == digest
        except MALFORMED:
            return False


class ShardWriter:
    """Packs entries into files, which a thread writes while the next are being made.

    Args:
        shard_bytes: About how large a file becomes.
        seconds: How old entries may become before a smaller one is written: what a kill costs.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2**28, seconds: float = 600):
        self.folder, self.shard_bytes, self.seconds = Path(folder), shard_bytes, seconds
        self.written: set[Path] = set()
        self._entries: dict[str, tuple[dict, Tensors]] = {}
        self._size, self._began = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def add(self, key: str, entry: Entry) -> None:
        """Take an entry; it is on disk once its shard is full, or the block ends."""
        tensors: Tensors = {}
        layout = {name: _take_apart(value, name, tensors) for name, value in entry.items()}
        self._entries[key] = layout, tensors
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        if self._size >= self.shard_bytes or time.monotonic() - self._began >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was added so far."""
        self._wait()  # one file at a time: no more than two shards are ever in memory
        if self._entries:
            self._writing = self._thread.submit(_write_shard, self.folder, self._entries)
        self._entries, self._size, self._began = {}, 0, time.monotonic()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.written.add(writing.result())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Wait for the disk; after an error, what is complete so far is kept."""
        try:
            self.flush()
            self._wait()
        finally:
            self._thread.shutdown()


def rewrite(shards: Iterable[Shard], keep: set[str], shard_bytes: int = 2**28) -> None:
    """Pack the entries `keep` of some shards anew, each once, then delete those files."""
    shards, kept = list(shards), set()
    folder = shards[0].path.parent
    with ShardWriter(folder, shard_bytes) as writer:
        for shard in shards:
            for key in sorted((shard.whole_entries() & keep) - kept):
                writer.add(key, shard.read(key))
                kept.add(key)
    for shard in shards:
        if shard.path not in writer.written:  # packed the same way again, it has the same name
            shard.path.unlink()


def _write_shard(folder: Path, entries: Mapping[str, tuple[dict, Tensors]]) -> Path:
    """Write one file of entries, all of it or nothing."""
    tensors, contents = {}, {}
    for key, (layout, own) in sorted(entries.items()):
        contents[key] = {"layout": layout, "digest": _digest_of_entry(key, layout, own)}
        tensors |= {f"{key}/{name}": tensor for name, tensor in own.items()}
    data = save(tensors, {LISTING: json.dumps(contents, sort_keys=True)})
    path = folder / f"{_new_digest(data).hexdigest()}.safetensors"
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path


# A part of an entry's layout is {"tensor": name}, {"image": name}, {"list": parts} or {"plain": value}.


def _take_apart(value: Any, name: str, tensors: Tensors) -> dict:
    """The layout of a value, whose tensors and images are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # by itself: it may be a view of a batch
        return {"tensor": name}
    if isinstance(value, Image.Image):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"image": name}
    if not isinstance(value, list | tuple):
        return {"plain": value}
    parts = [_take_apart(element, f"{name}/{number}", tensors) for number, element in enumerate(value)]
    return {"plain": list(value)} if all("plain" in part for part in parts) else {"list": parts}


def _put_together(part: Mapping, tensors: Tensors) -> Any:
    ((kind, value),) = part.items()
    make: dict[str, Callable] = {
        "tensor": tensors.__getitem__,
        "image": lambda name: Image.fromarray(tensors[name].numpy()),
        "list": lambda parts: [_put_together(element, tensors) for element in parts],
        "plain": lambda plain: plain,
    }
    return make[kind](value)


def _names(part: Mapping) -> list[str]:
    """Of the tensors in a part of a layout."""
    if "list" in part:
        return [name for element in part["list"] for name in _names(element)]
    return [part[kind] for kind in ("tensor", "image") if kind in part]


def _new_digest(data: bytes = b""):
    return blake2b(data, digest_size=16)


def _digest_of_entry(key: str, layout: Mapping, tensors: Tensors) -> str:
    digest = _new_digest(json.dumps([key, layout], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
