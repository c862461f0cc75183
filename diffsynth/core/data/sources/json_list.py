"""Iterate over the elements of a JSON list without reading the whole file."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

JSON_SPACE = " \t\n\r"
JSON_ENDS = (*JSON_SPACE, ",", "]")  # characters that can follow an element of a list
PIECE = 1 << 20  # characters that are read at a time; a guess


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"two keys are named {first_twice(name for name, _ in pairs)!r:.99}; rename or delete one")
    return values


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that stands there more than once; None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def row_error(number: int, error: ValueError | RecursionError, invalid: str) -> ValueError:
    """The error for a row, counted from 1, that ROW_DECODER cannot read; `invalid` is said if it is not JSON."""
    if isinstance(error, RecursionError):
        invalid = "lists or objects are nested too deeply; write the columns of a row as one flat object"
    elif not isinstance(error, json.JSONDecodeError):
        digits = "a number has too many digits; write it in quotes, as text"
        invalid = digits if "int_max_str_digits" in str(error) else str(error)
    return ValueError(f"row {number}: {invalid}")


ROW_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class JsonList:
    """Yields (value, JSON text) of each element of a file that is one JSON list, holding only a piece in memory.

    Args:
        file: The file, open for reading.

    Raises:
        ValueError: The file is no JSON list; names the element, counted from 1.
    """

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
                raise ValueError(f"row {number}: is followed by {mark or 'the end of the file'!r}, expected , or ]")
        if rest := self._peek():
            raise ValueError(f"the list of rows is followed by {rest!r}; write all rows in one list")

    def _element(self, number: int) -> tuple[Any, str]:
        """The next element and its text; reads on until it is complete."""
        self._peek()
        while True:
            try:
                value, end = ROW_DECODER.raw_decode(self.text, self.position)
                if self.text[end : end + 1] in JSON_ENDS or not self._read():  # a number may continue in the next piece
                    start, self.position = self.position, end
                    return value, self.text[start:end]
            except (ValueError, RecursionError) as error:
                message = getattr(error, "msg", "")
                if not (message and self._read()):
                    raise row_error(number, error, f"{message}; write [{{...}}, {{...}}]") from error

    def _take(self) -> str:
        """Consume the next character that is not white space."""
        mark = self._peek()
        self.position += len(mark)
        return mark

    def _peek(self) -> str:
        """The next character that is not white space; empty text at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in JSON_SPACE:
                    return self.text[self.position]
                self.position += 1
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Drop consumed text and read on; false at the end of the file.

        It reads at least as much as the text that is left, so that the time for a long element is linear in its length.
        """
        rest = self.text[self.position :]
        more = self.file.read(max(PIECE, len(rest)))
        if more:
            self.text, self.position = rest + more, 0
        return bool(more)
