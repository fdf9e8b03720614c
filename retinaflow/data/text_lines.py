"""Lines of text files: lists of names, and CSV files whose lines are counted and verified before they are parsed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.files import read_text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends, which are LF, CR LF or CR. Raises DataError for one that is no
    text."""
    return lines_of_text(read_text(path))


def lines_of_text(text: str) -> list[str]:
    """The lines of a text of :func:`~retinaflow.files.read_text`; other characters that Unicode counts as line ends
    are part of a line."""
    return text.removesuffix("\n").split("\n") if text else []


def has_rows(path: Path) -> bool:
    """Whether there is anything below the header."""
    with path.open("rb") as file:
        file.readline()
        return bool(file.read(1))


def lines_of_csv(path: Path, count: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """Row -> line, for rows below the header of which the reader has skipped blank lines."""

    @lru_cache(maxsize=1)
    def of_all() -> NDArray[np.int64] | None:
        if count_lines(path) != count + 1:
            with path.open("rb") as file:
                filled = [number for number, line in enumerate(file, 1) if line.strip(b"\r\n")]
            if len(filled) == count + 1:
                return np.array(filled[1:], dtype=np.int64)
        return None

    def lines_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        lines = of_all()
        return rows + 2 if lines is None else lines[rows]

    return lines_of


def filled_lines(path: Path) -> list[tuple[int, bytes]]:
    """Number and content of the lines below the header that are not blank."""
    return [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line and number > 1]


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


def count_lines(path: Path) -> int:
    """Number of lines of a file with the header and blank lines; the last line may lack its line break."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
