"""Tables of any number of rows in Arrow's format: small ones in memory, large ones in a memory-mapped file."""

import json
import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...files import replacing
from .storage import EmbeddedFile

logger = logging.getLogger(__name__)

IN_MEMORY = 16 << 20  # bytes; smaller sources are kept in memory and converted in each process; a guess
BATCH = 1 << 14  # rows that are in memory while a table is written; a guess
FORMAT = 2  # version of the files in the cache folder; part of their names
JSON_ROWS = pa.schema([("row", pa.large_string())], metadata={"rows": "json"})


class Rows(Sequence[dict]):
    """Rows of a data set, each a new dict; DataLoader workers receive the object by pickle, which should be small."""

    @abstractmethod
    def digest(self) -> str:
        """A hash (16 hex digits) of the rows, which does not depend on where they are stored."""


@dataclass(frozen=True)
class RenamedRows(Rows):
    """Rows with other names of columns.

    Args:
        rows: The rows.
        names: The new names by the old ones; other columns keep theirs.
    """

    rows: Rows
    names: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {self.names.get(name, name): value for name, value in self.rows[index].items()}

    def digest(self) -> str:
        return blake2b(f"{self.rows.digest()} {self.names}".encode(), digest_size=8).hexdigest()


class Table(Rows):
    """The rows of an Arrow IPC file, which is memory-mapped, or of a buffer in that format."""

    def __init__(self, source: str | pa.Buffer):
        self.source = source
        table = pa.ipc.open_file(pa.memory_map(source) if isinstance(source, str) else source).read_all()
        self.columns = dict(zip(table.column_names, table.columns, strict=True))
        self.count, self.is_json = len(table), table.schema.metadata == JSON_ROWS.metadata

    def __reduce__(self) -> tuple:
        return Table, (self.source,)  # of a file only the name is pickled, and each process maps it

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of a table of {self.count}")
        if self.is_json:
            return json.loads(self.columns["row"][index].as_py())
        return {name: read_cell(column, index) for name, column in self.columns.items()}

    def digest(self) -> str:
        digest = blake2b(repr(list(self.columns)).encode(), digest_size=8)
        # Read batch by batch, because pages of the memory map would count as memory of this process.
        file = pa.ipc.open_file(pa.OSFile(self.source) if isinstance(self.source, str) else self.source)
        for number in range(file.num_record_batches):
            for column in file.get_batch(number).columns:
                for buffer in filter(None, column.buffers()):
                    digest.update(buffer)
        return digest.hexdigest()


def make_table(name: str, batches: Iterator[pa.RecordBatch], size: int, *identity: Any) -> Table:
    """The table of a source: in memory if it is small, else converted once into a file in the cache folder.

    Args:
        name: Name of the source in messages.
        batches: The rows.
        size: Bytes of the source.
        identity: JSON values that change with the source and the way it is read; a file in the cache folder with the
            same identity is used again.

    Raises:
        ValueError: The file cannot be written to the cache folder.
    """
    if size <= IN_MEMORY:
        sink = pa.BufferOutputStream()
        _write(batches, sink)
        return Table(sink.getvalue())
    key = blake2b(json.dumps([FORMAT, *identity]).encode(), digest_size=16).hexdigest()
    file = cache_folder() / f"{key}.arrow"
    if file.exists():
        try:
            return Table(str(file))
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s is damaged (%s), and is made again.", file, error)
    logger.info("%s is converted into %s, once.", name, file)
    try:
        with replacing(file) as partial, pa.OSFile(str(partial), "wb") as sink:
            _write(batches, sink)
    except OSError as error:
        raise ValueError(f"the table of {name}: {error}; set DIFFSYNTH_CACHE to a folder for it") from error
    return Table(str(file))


def cache_folder() -> Path:
    """The folder of converted tables, which can be deleted between runs."""
    return Path(os.environ.get("DIFFSYNTH_CACHE", "~/.cache/diffsynth")).expanduser() / "tables"


def chunks(items: Iterable) -> Iterator[list]:
    """Lists of up to BATCH items; at least one list, so that a table without rows has its columns."""
    items = iter(items)
    yield list(islice(items, BATCH))
    while chunk := list(islice(items, BATCH)):
        yield chunk


def json_batches(texts: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Batches of rows, given as texts of one JSON object each; each row keeps its own keys and types."""
    for chunk in chunks(texts):
        yield pa.record_batch([pa.array(chunk, pa.large_string())], schema=JSON_ROWS)


def read_cell(column: pa.ChunkedArray, index: int) -> Any:
    """The Python value of a cell; binary data, or a struct of `bytes` and `path`, becomes an `EmbeddedFile`."""
    if _holds_files(column.type):
        return _file(column.slice(index, 1).chunk(0))
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if is_list and _holds_files(column.type.value_type):
        files = column.slice(index, 1).chunk(0).flatten()
        return [_file(files.slice(number, 1)) for number in range(len(files))]
    try:
        return column[index].as_py()
    except (ValueError, OverflowError):  # Python has no date after the year 9999, and no nanoseconds
        return column.slice(index, 1).cast(pa.string())[0].as_py()


def _holds_files(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _file(cell: pa.Array) -> EmbeddedFile | str | None:
    if cell.null_count:
        return None
    if not pa.types.is_struct(cell.type):
        return EmbeddedFile(cell, "embedded file")
    path, content = cell.field("path")[0].as_py(), cell.field("bytes")
    return path if content.null_count else EmbeddedFile(content, path or "embedded file")


def _write(batches: Iterator[pa.RecordBatch], sink: pa.NativeFile) -> None:
    first = next(batches)
    with pa.ipc.new_file(sink, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty: None, blank text, an empty list, or NaN, which other programs write for empty cells.

    The text "NaN" is text: a table is read with its types, and Nan may be a grandmother.
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value != value
