"""Metadata tables: from a file of a format that people write to rows."""

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

PARQUET_ROWS = 1 << 10  # that are read at a time: they may hold whole images


def read_metadata(path: str | Path, encoding: str = "utf-8") -> Table:
    """Reads the rows of a `.csv`, `.json` (a list of objects), `.jsonl` (an object a line) or `.parquet` table.

    Raises:
        ValueError: The table cannot be read; the row at fault is counted from 1, without header and blank lines.
    """
    path = os.fspath(path)
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"metadata {path}: suffix {suffix!r} is not one of {', '.join(READERS)}")
    try:
        _, size, version = stored(path)
        identity = (absolute(path), size, version, encoding)
        if suffix == ".csv":
            with suppress(pa.ArrowInvalid):  # what Arrow refuses, Python's reader takes, or says where it is wrong
                return make_table(path, _arrow_csv_batches(path, encoding), size, *identity)
        return make_table(path, READERS[suffix](path, encoding), size, *identity)
    except FileNotFoundError:
        raise ValueError(f"metadata {path}: not found") from None
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8, or say what it is saved as, such as dataset.encoding=gbk"
        raise ValueError(f"metadata {path}: {error}; {remedy}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"metadata {path}: {error}") from error


def open_text(path: str, encoding: str) -> TextIO:
    """Opens a text file without its byte order mark, which spreadsheets write and a first column would be named by.

    Raises:
        ValueError: There is no such encoding.
    """
    try:
        known = codecs.lookup(encoding).name
    except LookupError as error:
        raise ValueError(f"{error}; name one that Python knows, such as dataset.encoding=gbk") from error
    return TextIOWrapper(open_file(path), "utf-8-sig" if known == "utf-8" else known, newline="")


def _arrow_csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """What `_csv_batches` gives, of a file of which each row has a cell for each column; 20 × as fast."""
    with open_text(path, encoding) as file:
        header = next(filter(None, csv.reader(file)), [])
    with open_file(path) as source:
        texts = ConvertOptions(column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False)
        reader = open_csv(source, ReadOptions(encoding=encoding), ParseOptions(newlines_in_values=True), texts)
        yield pa.RecordBatch.from_pylist([], reader.schema)
        yield from reader


def _csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_text(path, encoding) as file:
        rows = filter(None, csv.reader(file))  # a blank line is a row without cells
        header, count = next(rows, []), 0
        for chunk in chunks(rows):
            _require_cells(chunk, len(header), count)
            cells = {name: column for name, *column in zip_longest(header, *chunk)}  # a short row ends in None
            yield pa.record_batch({name: pa.array(column, pa.large_string()) for name, column in cells.items()})
            count += len(chunk)


def _require_cells(rows: list[list[str]], expected: int, before: int) -> None:
    if max(map(len, rows), default=0) > expected:
        number, found = next((number, len(row)) for number, row in enumerate(rows, before + 1) if len(row) > expected)
        raise ValueError(f"row {number}: {found} cells, {expected} columns; quote a cell that contains commas")


def _json_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_text(path, encoding) as file:
        yield from json_batches(_require_objects(JsonList(file)))


def _jsonl_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_text(path, encoding) as file:
        lines = filter(None, map(str.strip, file))
        yield from json_batches(_require_objects((_parse(n, line), line) for n, line in enumerate(lines, 1)))


def _parse(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}; write one JSON object a line") from error


def _require_objects(rows: Iterable[tuple[Any, str]]) -> Iterator[str]:
    """The texts of rows, each of them given with what it says."""
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
    """Categories become values: an IPC file has room for one dictionary, and each batch brings its own."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


READERS = {".csv": _csv_batches, ".json": _json_batches, ".jsonl": _jsonl_batches, ".parquet": _parquet_batches}
