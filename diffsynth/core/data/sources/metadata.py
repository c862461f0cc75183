"""Read metadata tables: csv, json, jsonl and parquet."""

import codecs
import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, open_csv
from pyarrow.parquet import ParquetFile

from .json_list import JsonList
from .storage import absolute, open_file, stored
from .table import Table, chunks, json_batches, make_table

PARQUET_ROWS = 1 << 10  # rows that are read at a time, few as they may contain whole images; a guess


def read_metadata(path: str | Path, encoding: str = "utf-8") -> Table:
    """Read the rows of a `.csv`, `.json` (a list of objects), `.jsonl` (an object per line) or `.parquet` table.

    Raises:
        ValueError: The table cannot be read; rows are counted from 1, without the header and blank lines.
    """
    path = os.fspath(path)
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"metadata {path}: suffix {suffix!r} is not one of {', '.join(READERS)}; set dataset.metadata")
    try:
        _, size, version = stored(path)
        identity = (absolute(path), size, version, encoding)
        if suffix == ".csv":
            # Python's reader, below, accepts some files that Arrow refuses; of others it names the row at fault.
            with suppress(pa.ArrowInvalid):
                return make_table(path, _arrow_csv_batches(path, encoding), size, *identity)
        return make_table(path, READERS[suffix](path, encoding), size, *identity)
    except FileNotFoundError:
        raise ValueError(f"metadata {path}: not found; set dataset.metadata") from None
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8, or set its encoding, such as dataset.encoding=gbk"
        raise ValueError(f"metadata {path}: {error}; {remedy}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"metadata {path}: {error}") from error


def open_text(path: str, encoding: str) -> TextIO:
    """Open a text file, skipping the byte order mark that spreadsheets write.

    Raises:
        ValueError: There is no such encoding.
    """
    try:
        known = codecs.lookup(encoding).name
    except LookupError as error:
        raise ValueError(f"{error}; set one that Python knows, such as dataset.encoding=gbk") from error
    return TextIOWrapper(open_file(path), "utf-8-sig" if known == "utf-8" else known, newline="")


def _arrow_csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """The same as `_csv_batches`, 20 × as fast, for files in which every row has a cell for every column."""
    with open_text(path, encoding) as file:
        header = next(filter(None, csv.reader(file)), [])
    with open_file(path) as source:
        texts = ConvertOptions(column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False)
        reader = open_csv(source, ReadOptions(encoding=encoding), ParseOptions(newlines_in_values=True), texts)
        yield pa.RecordBatch.from_pylist([], reader.schema)
        yield from reader


def _csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """Batches of rows, all cells as text; a row may have too few cells."""
    with open_text(path, encoding) as file:
        rows = filter(None, csv.reader(file))  # csv.reader returns an empty row for a blank line
        header, count = next(rows, []), 0
        for chunk in chunks(rows):
            _require_cells(chunk, len(header), count)
            cells = {name: column for name, *column in zip_longest(header, *chunk)}  # a short row is filled with None
            yield pa.record_batch({name: pa.array(column, pa.large_string()) for name, column in cells.items()})
            count += len(chunk)


def _require_cells(rows: list[list[str]], expected: int, before: int) -> None:
    if max(map(len, rows), default=0) > expected:
        numbered = enumerate(rows, before + 1)
        number, found = next((number, len(row)) for number, row in numbered if len(row) > expected)
        raise ValueError(f"row {number}: {found} cells, {expected} columns; quote a cell that contains commas")


def _json_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_text(path, encoding) as file:
        yield from json_batches(_require_objects(JsonList(file)))


def _jsonl_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_text(path, encoding) as file:
        lines = filter(None, map(str.strip, file))
        rows = ((_parse(number, line), line) for number, line in enumerate(lines, 1))
        yield from json_batches(_require_objects(rows))


def _parse(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}; write one JSON object per line") from error


def _require_objects(rows: Iterable[tuple[Any, str]]) -> Iterator[str]:
    """The JSON texts of (value, text) pairs, checked to be objects."""
    for number, (row, text) in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: {row!r} is not an object of columns and values")
        yield text


def _parquet_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_file(path) as source:
        file = ParquetFile(source)
        schema = pa.schema([field.with_type(_plain(field.type)) for field in file.schema_arrow])
        yield pa.RecordBatch.from_pylist([], schema)
        for batch in file.iter_batches(PARQUET_ROWS):
            yield batch.cast(schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The value type of a dictionary type: an IPC file has room for one dictionary, but each batch has its own."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


READERS = {".csv": _csv_batches, ".json": _json_batches, ".jsonl": _jsonl_batches, ".parquet": _parquet_batches}
