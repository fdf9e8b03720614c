"""Lines of text files: lists of names, and CSV files in blocks of whole lines."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retinaflow.errors import DataError
from retinaflow.files import read_text, text_encoding

_BLOCK = 1 << 25
"""Bytes of a file that are held at a time."""
_LONGEST = 1 << 28


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends, which are LF, CR LF or CR. Raises DataError for one that is no
    text."""
    return lines_of_text(read_text(path))


def lines_of_text(text: str) -> list[str]:
    """The lines of a text of :func:`~retinaflow.files.read_text`; other characters that Unicode counts as line ends
    are part of a line."""
    return text.removesuffix("\n").split("\n") if text else []


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of a file in UTF-8, each with LF at its end; ``first_line`` counts from 1."""

    first_line: int
    content: bytes

    @property
    def count(self) -> int:
        """Number of lines, blank ones too."""
        return self.content.count(b"\n")

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and content of each line, without its end."""
        return enumerate(self.content.removesuffix(b"\n").split(b"\n"), self.first_line)

    def may_have_flaws(self) -> bool:
        """Whether :func:`flaw_of` can find anything in its lines."""
        try:
            return '"' in self.content.decode()
        except UnicodeDecodeError:
            return True


def line_blocks(path: Path, *, size: int = _BLOCK) -> Iterator[LineBlock]:
    """The lines of a text file in blocks of about ``size`` bytes; they end with LF, CR LF or CR.

    UTF-16 and UTF-32 with a byte order mark are decoded; other bytes come as they are. Raises DataError for text that
    cannot be decoded, and for a line of more than :data:`_LONGEST` bytes.
    """
    first_line, rest = 1, b""
    for data in _utf_8(path, size):
        content = rest + data
        # LF may follow in the next block.
        held = b"\r" if content.endswith(b"\r") else b""
        content = _with_lf(content.removesuffix(b"\r"))
        end = content.rfind(b"\n") + 1
        rest = content[end:] + held
        if len(rest) > _LONGEST:
            raise DataError(
                f"{path} line {first_line + content.count(10)}: a line must have at most {_LONGEST:,} bytes"
            )
        if end:
            block = LineBlock(first_line, content[:end])
            first_line += block.count
            yield block
    if rest:
        yield LineBlock(first_line, _with_lf(rest).removesuffix(b"\n") + b"\n")


def _with_lf(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content


def _utf_8(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        encoding = text_encoding(file.read(4))
        file.seek(0)
        if encoding == "utf-8-sig":
            yield file.read(size).removeprefix(codecs.BOM_UTF8)
            while data := file.read(size):
                yield data
            return
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            while data := file.read(size):
                yield decoder.decode(data).encode()
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise DataError(f"{path}: the file begins as {encoding}, but is not: {error}") from None


def flaw_of(line: bytes) -> str | None:
    """The rule that a line breaks before it is parsed, or None."""
    try:
        text = line.decode()
        if '"' in text:
            list(csv.reader([text], strict=True))
    except UnicodeDecodeError:
        return "a row must be text in UTF-8"
    except csv.Error:
        return "quotes must open and close around a field of the line"
    return None
