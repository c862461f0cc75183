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

from .storage import absolute, open_file, stored
from .table import Table, chunks, json_batches, make_table

JSON_SPACE = " \t\n\r"
JSON_ENDS = (*JSON_SPACE, ",", "]")  # what can follow an element of a list
PIECE = 1 << 20  # characters of a JSON list that are read at a time
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


class JsonList:
    """The elements of a file that is one JSON list, each with its text, without holding more than a piece of it."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.position = file, file.read(PIECE), 0

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        if self._take() != "[":
            kind = type(json.loads(self.text + self.file.read())).__name__
            raise ValueError(f"holds one {kind}, not a list of rows; write [{{...}}, {{...}}]")
        number, mark = 0, self._take() if self._peek() == "]" else ","
        while mark != "]":
            number += 1
            yield self._element(number)
            mark = self._take()
            if mark not in ("]", ","):
                raise ValueError(f"row {number}: is followed by {mark or 'the end of the file'!r}, not by , or ]")
        if rest := self._peek():
            raise ValueError(f"the list of rows is followed by {rest!r}; write all rows in one list")

    def _element(self, number: int) -> tuple[Any, str]:
        self._peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.position)
                if self.text[end : end + 1] in JSON_ENDS or not self._read():  # a number could go on
                    start, self.position = self.position, end
                    return value, self.text[start:end]
            except json.JSONDecodeError as error:
                if not self._read():
                    raise ValueError(f"row {number}: {error.msg}; write [{{...}}, {{...}}]") from error

    def _take(self) -> str:
        mark = self._peek()
        self.position += len(mark)
        return mark

    def _peek(self) -> str:
        """The next character that is not white space, none at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in JSON_SPACE:
                    return self.text[self.position]
                self.position += 1
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Forgets what is taken and reads on, as much again, so that a long element costs no more than its length."""
        rest = self.text[self.position :]
        more = self.file.read(max(PIECE, len(rest)))
        if more:
            self.text, self.position = rest + more, 0
        return bool(more)


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
