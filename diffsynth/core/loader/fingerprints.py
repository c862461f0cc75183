"""Fingerprints of weights and folders: hashes that tell one model from another without reading all of it."""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from .building import find_config

# Blocks that `fingerprint` reads of each file, and their size in bytes; guesses.
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BYTES = 4096


def fingerprint(files: Sequence[Path], config: str | Path | Mapping | None = None) -> str:
    """A hash (16 hex digits) of weights: of config.json, the tensors' names and shapes, and some of their bytes.

    Reading all of a large model would take minutes, and any further training changes nearly every weight.

    Args:
        config: Another config.json than that beside the first file, its folder, or its content.
    """
    digest = blake2b(_bytes(config if config is not None else files[0].parent), digest_size=8)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header))
            for offset in range(8 + header, size, max(1, (size - 8 - header) // FINGERPRINT_BLOCKS)):
                stream.seek(offset)
                digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _bytes(config: str | Path | Mapping) -> bytes:
    if isinstance(config, Mapping):
        return json.dumps(config, sort_keys=True).encode()
    return find_config(Path(config)).read_bytes()


def fingerprint_folder(folder: Path) -> str:
    """A hash (16 hex digits) of the files in a folder, such as a tokenizer's."""
    digest = blake2b(digest_size=8)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
