"""The lists of a large JSON file, element by element: memory for one element and a block of text, whatever the file.

The text is decoded in blocks and parsed by Python's own scanner, an element at a time. Any Unicode encoding that
:mod:`retinaflow.files` reads will do.
"""

from __future__ import annotations

import codecs
import json
import json.scanner
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from retinaflow.errors import DataError, first_line, shown
from retinaflow.files import decoded, text_encoding

_BLOCK = 1 << 20
"""Bytes that are read at a time."""
_SPACE = re.compile(r"[ \t\n\r]*")
_LITERAL = 16
"""Characters at the end of the text in which an error may only mean that the rest of a value is missing."""


def elements(path: Path, lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """(list, number from 1, element) for the named lists of the object in a file, in the order of the file; for a list
    (list, 0, None) comes first. Each other value of the object comes whole, as (name, 0, value).

    Raises DataError for a file that is no JSON object, or that gives one of the lists twice or not as a list.
    """
    with path.open("rb") as file:
        text = _Text(path, file)
        seen: set[str] = set()
        text.expect("{")
        if text.next() == "}":
            text.expect("}")
        else:
            separator = ","
            while separator == ",":
                key = text.value()
                if not isinstance(key, str):
                    raise text.error(f"a name must be a text, but got {shown(key)}")
                text.expect(":")
                if key in lists:
                    if key in seen or text.next() != "[":
                        raise DataError(f"{path}: {key} must be given once, as a list")
                    seen.add(key)
                    yield key, 0, None
                    yield from _elements(text, key)
                else:
                    yield key, 0, text.value()
                separator = text.expect(",}")
        if text.next():
            raise text.error("extra data after the end of its object")


def list_elements(path: Path) -> Iterator[Any]:
    """The elements of a file that is one list. Raises DataError for a file that is no JSON list."""
    with path.open("rb") as file:
        text = _Text(path, file)
        for _, _, element in _elements(text, "the list"):
            yield element
        if text.next():
            raise text.error("extra data after the end of its list")


def first_character(path: Path) -> str:
    """The first character that is no white space: ``[`` for a list, ``{`` for an object; empty without any."""
    with path.open("rb") as file:
        return _Text(path, file).next()


def _elements(text: _Text, key: str) -> Iterator[tuple[str, int, Any]]:
    text.expect("[")
    if text.next() == "]":
        text.expect("]")
        return
    number, separator = 0, ","
    while separator == ",":
        number += 1
        text.where = f" in {key}, element {number}"
        yield key, number, text.value()
        separator = text.expect(",]")
    text.where = ""


class _Text:
    """The text of a file from a position on, of which a block is in memory."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.where = ""
        self._path, self._file = path, file
        start = file.read(4)
        file.seek(0)
        self._decoder = codecs.getincrementaldecoder(text_encoding(start))()
        self._scan = json.scanner.make_scanner(json.JSONDecoder())  # type: ignore[arg-type]
        self._buffer, self._position, self._at_end = "", 0, False

    def next(self) -> str:
        """The next character after white space, which stays; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """The next character after white space, which must be one of some."""
        found = self.next()
        if not found or found not in characters:
            raise self.error(f"expected {' or '.join(characters)}, but got {found!r}" if found else "it is cut short")
        self._position += 1
        return found

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                value, end = self._scan(self._buffer, self._position)
            except (StopIteration, json.JSONDecodeError) as error:
                place = error.pos if isinstance(error, json.JSONDecodeError) else error.value
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "expected a value"
                # Text that is missing shows as an error near the end, or as a text without end.
                may_be_cut = place >= len(self._buffer) - _LITERAL or reason.startswith("Unterminated")
                if not may_be_cut or not self._more():
                    raise self.error(reason) from None
            except RecursionError:
                raise self.error("its values are nested too deep") from None
            except ValueError as error:  # an integer of more than 4,300 digits
                raise self.error(first_line(error)) from None
            else:
                # A number at the end may continue in the next block.
                if end == len(self._buffer) and self._more():
                    continue
                self._position = end
                return value

    def error(self, reason: str) -> DataError:
        """An error at the present position."""
        return DataError(f"{self._path}: not a readable JSON file{self.where}: {reason}")

    def _more(self) -> bool:
        if self._at_end:
            return False
        left = self._buffer[self._position :]
        # Twice as much each time, so that a value of any length is scanned a few times only.
        block = self._file.read(max(_BLOCK, len(left)))
        self._at_end = not block
        try:
            self._buffer = left + self._decoder.decode(block, final=self._at_end)
        except UnicodeDecodeError:
            decoded(self._path.read_bytes(), self._path)  # raises the error with the line
            raise
        self._position = 0
        return True
