"""Entries packed into safetensors files, each named by the digest of its own bytes.

So a file proves itself without any index, and no two processes ever write the same name. A shard's metadata lists its
entries: the names of their tensors, their plain values, and a digest of each, which tells the good ones of a
damaged file.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...files import replacing

Entry = dict[str, Any]  # tensors, images, and plain values, by name


class DamagedShard(ValueError):
    """A shard that is not what was written; the message says in what."""


class Shard:
    """One file of entries, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _file(self):
        try:
            return safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise DamagedShard(f"{self.path} cannot be read: {error}") from error

    @cached_property
    def contents(self) -> dict[str, dict]:
        """What the file says of each entry, by key."""
        try:
            return json.loads(self._file.metadata()["entries"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedShard(f"{self.path} lists no entries: {error!r}") from error

    def read(self, key: str) -> Entry:
        """One entry.

        Raises:
            DamagedShard: The file cannot be read, or holds no such entry.
        """
        try:
            about = self.contents[key]
            tensors = {name: self._file.get_tensor(f"{key}/{name}") for name in about["tensors"]}
        except (KeyError, SafetensorError) as error:
            raise DamagedShard(f"{self.path} does not hold {key}: {error}") from error
        images = {name: Image.fromarray(tensors[name].numpy()) for name in about["images"]}
        return {**tensors, **images, **about["plain"]}

    def is_whole(self) -> bool:
        """Whether the file's bytes are those that were written."""
        with self.path.open("rb") as file:
            return _digest(file.read()) == self.path.stem

    def whole_entries(self) -> set[str]:
        """Keys of the entries that are as they were written, in a file that may not be whole."""
        try:
            return {key for key, about in self.contents.items() if self._is_whole(key, about)}
        except DamagedShard:
            return set()

    def _is_whole(self, key: str, about: Mapping) -> bool:
        try:
            tensors = {name: self._file.get_tensor(f"{key}/{name}") for name in about["tensors"]}
            return _digest_of_entry(tensors, about["plain"]) == about["digest"]
        except (KeyError, TypeError, SafetensorError):
            return False


class ShardWriter:
    """Packs entries into files of about `shard_bytes`, which a thread writes while the next are being made."""

    def __init__(self, folder: Path, shard_bytes: int = 2**28):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.written: set[Path] = set()
        self._entries: dict[str, Entry] = {}
        self._size = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def add(self, key: str, entry: Entry) -> None:
        """Take an entry; it is on disk once its shard is full, or `close` returns."""
        self._entries[key] = {name: _kept(value) for name, value in entry.items()}
        self._size += sum(value.nbytes for value in entry.values() if isinstance(value, Tensor))
        if self._size >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added so far."""
        self._wait()  # one file at a time: no more than two shards are ever in memory
        if self._entries:
            self._writing = self._thread.submit(write_shard, self.folder, self._entries)
        self._entries, self._size = {}, 0

    def _wait(self) -> None:
        if self._writing is not None:
            self.written.add(self._writing.result())
            self._writing = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Wait for the disk; after an error, what is complete so far is kept."""
        self.flush()
        self._thread.shutdown()
        self._wait()


def write_shard(folder: Path, entries: Mapping[str, Entry]) -> Path:
    """Write one file of entries, all of it or nothing."""
    tensors, contents = {}, {}
    for key, entry in sorted(entries.items()):
        images = sorted(name for name, value in entry.items() if isinstance(value, Image.Image))
        own = {name: _as_tensor(value) for name, value in entry.items() if isinstance(value, Tensor | Image.Image)}
        plain = {name: value for name, value in entry.items() if name not in own}
        digest = _digest_of_entry(own, plain)
        contents[key] = {"tensors": sorted(own), "images": images, "plain": plain, "digest": digest}
        tensors |= {f"{key}/{name}": tensor for name, tensor in own.items()}
    data = save(tensors, {"entries": json.dumps(contents, sort_keys=True)})
    path = Path(folder) / f"{_digest(data)}.safetensors"
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path


def rewrite(shards: Iterable[Shard], keep: set[str], shard_bytes: int = 2**28) -> None:
    """Pack the entries `keep` of some shards anew, then delete those files."""
    shards, kept = list(shards), set()
    folder = shards[0].path.parent
    with ShardWriter(folder, shard_bytes) as writer:
        for shard in shards:
            for key in sorted(shard.whole_entries() & keep - kept):
                writer.add(key, shard.read(key))
                kept.add(key)
    for shard in shards:
        if shard.path not in writer.written:  # packed the same way again, it has the same name
            shard.path.unlink()


def _kept(value: Any) -> Any:
    """A tensor by itself on the host: it may be a view of a batch."""
    return value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value


def _as_tensor(value: Tensor | Image.Image) -> Tensor:
    return torch.from_numpy(np.array(value)) if isinstance(value, Image.Image) else value


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _digest_of_entry(tensors: Mapping[str, Tensor], plain: Mapping) -> str:
    digest = blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
