"""Iterate over the elements of a JSON list without reading the whole file."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

JSON_SPACE = " \t\n\r"
JSON_ENDS = (*JSON_SPACE, ",", "]")  # characters that can follow an element of a list
PIECE = 1 << 20  # characters that are read at a time; a guess


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
                value, end = json.JSONDecoder().raw_decode(self.text, self.position)
                if self.text[end : end + 1] in JSON_ENDS or not self._read():  # a number may continue in the next piece
                    start, self.position = self.position, end
                    return value, self.text[start:end]
            except json.JSONDecodeError as error:
                if not self._read():
                    raise ValueError(f"row {number}: {error.msg}; write [{{...}}, {{...}}]") from error

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
