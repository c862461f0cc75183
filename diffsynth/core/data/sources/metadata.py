"""Read metadata tables: csv, json, jsonl and parquet."""

import codecs
import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, open_csv
from pyarrow.parquet import ParquetFile

from .json_list import ROW_DECODER, JsonList, first_twice, row_error
from .storage import FollowedFile, absolute, is_remote, open_file, sampled_digest, stored
from .table import Table, chunks, json_batches, make_table

END = (
    "\x03end of the table\x03"  # a row after the last one; within quotes that are never closed it is no row of its own
)
MOST_COLUMNS = 10_000  # a guess: a csv of 4 MB may have a million, none of which is a column
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
        digest = "" if is_remote(path) else sampled_digest(path, size)  # a store's version changes with the content
        identity = (absolute(path), size, version, digest, encoding)
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata {path}: {error}") from error


def open_text(path: str, encoding: str) -> TextIO:
    """Open a text file, skipping the byte order mark that spreadsheets write.

    Raises:
        ValueError: There is no such encoding.
    """
    try:
        "".encode(encoding)  # codecs.lookup also knows base64 and others, which are not of text
    except LookupError as error:
        remedy = "set one of text that Python knows, such as dataset.encoding=gbk"
        raise ValueError(f"unknown encoding: {encoding}; {remedy}") from error
    known = codecs.lookup(encoding).name
    return TextIOWrapper(open_file(path), "utf-8-sig" if known == "utf-8" else known, newline="")


def _arrow_csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """The same as `_csv_batches`, 20 × as fast, for files in which every row has a cell for every column."""
    separator, header = _csv_header(path, encoding)
    if not header or "a".encode(encoding) != b"a":
        raise pa.ArrowInvalid("no last row can be appended to a file without columns, or in UTF-16")
    last_row = f"\n{END}{separator * (len(header) - 1)}\n".encode("ascii")
    texts = ConvertOptions(column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False)
    parsing = ParseOptions(delimiter=separator, newlines_in_values=True)
    with open_file(path) as file, FollowedFile(file, last_row) as source:
        reader = open_csv(source, ReadOptions(encoding=encoding), parsing, texts)
        yield pa.RecordBatch.from_pylist([], reader.schema)
        yield from _without_end(reader)


def _without_end(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches without their last row, which is END, or the rest of the file after a quote that is never closed."""
    batches, count = filter(len, batches), 0
    held = next(batches)
    for batch in batches:
        count += len(held)
        yield held
        held = batch
    if held.column(0)[-1].as_py() != END:
        raise _unclosed(count + len(held))
    yield held.slice(0, len(held) - 1)


def _csv_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """Batches of rows, all cells as text; a row may have too few cells."""
    separator, header = _csv_header(path, encoding)
    with open_text(path, encoding) as file:
        rows, count = islice(_csv_rows(file, separator), 1, None), 0
        for chunk in chunks(rows):
            _require_cells(chunk, header, separator, count)
            cells = {name: column for name, *column in zip_longest(header, *chunk)}  # a short row is filled with None
            yield pa.record_batch({name: pa.array(column, pa.large_string()) for name, column in cells.items()})
            count += len(chunk)


def _csv_header(path: str, encoding: str) -> tuple[str, list[str]]:
    """The separator of a csv, and the names of its columns.

    Spreadsheets write `;` where the comma is the decimal mark, and tabs on request.

    Raises:
        ValueError: A name stands there twice, or there are too many.
    """
    with open_text(path, encoding) as file:
        first = next(filter(str.strip, file), "")
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        header = next(_csv_rows(chain([first], file), separator), [])
    _check_columns(header)
    return separator, header


def _csv_rows(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    """The rows of a csv, the header first, without blank lines.

    Raises:
        ValueError: The file ends within quotes, or a cell is too long.
    """
    number = 0
    rows = csv.reader(chain(lines, ["\n", END]), delimiter=separator)
    try:
        for number, row in enumerate(filter(None, rows)):  # csv.reader returns an empty row for a blank line
            if row == [END]:
                return
            if row[-1].endswith(END):
                raise _unclosed(number)
            yield row
    except csv.Error as error:
        raise ValueError(f"after row {number}: {error}; is a quote opened there and never closed?") from error


def _unclosed(number: int) -> ValueError:
    row = f"row {number}" if number else "the header"
    return ValueError(f'{row}: a quote is opened and never closed; close it, or write "" for a quote within quotes')


def _check_columns(columns: list[str]) -> None:
    if len(columns) > MOST_COLUMNS:
        raise ValueError(f"{len(columns)} columns, expected at most {MOST_COLUMNS}; delete those that are not read")
    if twice := first_twice(filter(None, columns)):
        raise ValueError(f"two columns are named {twice!r:.99}; rename or delete one")


def _require_cells(rows: list[list[str]], header: list[str], separator: str, before: int) -> None:
    expected = len(header)
    if max(map(len, rows), default=0) > expected:
        numbered = enumerate(rows, before + 1)
        number, found = next((number, len(row)) for number, row in numbered if len(row) > expected)
        raise ValueError(f"row {number}: {found} cells, {expected} columns; quote a cell that contains {separator!r}")


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
        return ROW_DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise row_error(number, error, f"{error}; write one JSON object per line") from error


def _require_objects(rows: Iterable[tuple[Any, str]]) -> Iterator[str]:
    """The JSON texts of (value, text) pairs, checked to be objects."""
    for number, (row, text) in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: {row!r:.99} is not an object of columns and values")
        yield text


def _parquet_batches(path: str, encoding: str) -> Iterator[pa.RecordBatch]:
    with open_file(path) as source:
        try:
            file = ParquetFile(source)
            _check_columns(file.schema_arrow.names)
            schema = pa.schema([field.with_type(_plain(field.type)) for field in file.schema_arrow])
            yield pa.RecordBatch.from_pylist([], schema)
            for batch in file.iter_batches(PARQUET_ROWS):
                batch.validate(full=True)  # text that is no UTF-8 would be found when its row is read
                yield batch.cast(schema)
        except OSError as error:  # Arrow's, which names no file
            raise ValueError(f"is damaged: {str(error).strip()}; write it again") from error


def _plain(kind: pa.DataType) -> pa.DataType:
    """The value type of a dictionary type: an IPC file has room for one dictionary, but each batch has its own."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


READERS = {".csv": _csv_batches, ".json": _json_batches, ".jsonl": _jsonl_batches, ".parquet": _parquet_batches}
