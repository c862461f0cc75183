"""Metadata tables as lists of rows."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path


def read_metadata(path: str | Path) -> list[dict]:
    """Reads the rows of a `.csv`, `.json` (a list of objects) or `.jsonl` (an object a line) table, in UTF-8.

    Raises:
        ValueError: The table cannot be read; the row at fault is counted from 1, without header and blank lines.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"metadata {path}: suffix {suffix!r} is not one of {', '.join(READERS)}")
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front, which would become part of the first column's name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(READERS[suffix](file))
    except FileNotFoundError:
        raise ValueError(f"metadata {path}: not found") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"metadata {path}: {error}; save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"metadata {path}: {error}") from error


def _csv_rows(file) -> Iterator[dict]:
    reader = csv.DictReader(file)
    for number, row in enumerate(reader, 1):
        if None in row:
            found, expected = len(row) - 1 + len(row[None]), len(reader.fieldnames)
            raise ValueError(f"row {number}: {found} cells, {expected} columns; quote a cell that contains commas")
        yield row


def _json_rows(file) -> Iterator[dict]:
    rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError(f"holds one {type(rows).__name__}, not a list of rows; write [{{...}}, {{...}}]")
    return (_as_row(number, row) for number, row in enumerate(rows, 1))


def _jsonl_rows(file) -> Iterator[dict]:
    lines = (line for line in file if line.strip())
    return (_as_row(number, _parse(number, line)) for number, line in enumerate(lines, 1))


def _parse(number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}; write one JSON object a line") from error


def _as_row(number: int, row) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"row {number}: {row!r} is not an object of columns and values")
    return row


READERS = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
