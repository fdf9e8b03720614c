"""Tables as numpy columns with line numbers, and the errors of their rows.

An error names file, line (of a Parquet file or frame: row), rule and value. Errors stop the reading with a list of the
first ones, or the rows are dropped and listed (``on_bad_row=drop``). However many there are, at most :data:`LISTED` of
each rule are kept; the others are counted.

No row becomes a Python object: text columns are codes into their distinct values (:class:`TextColumn`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute
from numpy.typing import NDArray

from retinaflow.errors import DataError, shown
from retinaflow.settings.data_settings import OnBadRow

SHOWN = 5
"""Errors listed in a message."""
LISTED = 20_000
"""Errors of a rule that are listed in ``dropped.csv``; a last row counts the others."""


class RowError(NamedTuple):
    """A row that breaks a rule."""

    file: str
    line: int
    """From 1; 0 where ``file`` names more than a file (``train.json annotation 7``)."""
    rule: str
    value: str
    rows: int = 1
    """More than 1 for the row that counts the errors that are not listed."""

    def __str__(self) -> str:
        where = f"{self.file} line {self.line}" if self.line else self.file
        return f"{where}: {self.rule}, but got {self.value}"


def errors_frame(errors: Iterable[RowError]) -> pd.DataFrame:
    """Columns file, line, rule, value, rows: what is written as ``dropped.csv``."""
    return pd.DataFrame(list(errors), columns=list(RowError._fields))


@dataclass
class RowErrors:
    """Collects errors; :meth:`settle` raises the first of them, or lets the reading continue without those rows."""

    on_bad_row: OnBadRow = "stop"
    found: list[RowError] = field(default_factory=list)
    """Of each rule the first :data:`LISTED` errors, or the first :data:`SHOWN` when they stop the reading."""
    count: int = 0
    """All errors, listed or not."""
    notices: list[str] = field(default_factory=list)
    """What is left out without being an error, a line each; printed whenever the data is loaded."""
    left_out: int = 0
    """The rows of :attr:`notices`."""
    hints: list[str] = field(default_factory=list)
    """What may have caused the errors, a line each."""
    _listed: Counter[str] = field(default_factory=Counter)
    _unlisted: dict[str, RowError] = field(default_factory=dict)

    def note(self, file: str, rule: str, lines: NDArray[np.int64], value: Callable[[int], str]) -> None:
        """Add rows of a file that break a rule; ``value(n)`` describes the n-th of them."""
        most = LISTED if self.on_bad_row == "drop" else SHOWN
        listed = lines[: max(most - self._listed[rule], 0)]
        self._listed[rule] += len(listed)
        self.found += [RowError(file, int(line), rule, value(n)) for n, line in enumerate(listed)]
        self._count(file, rule, len(lines), unlisted=len(lines) - len(listed))

    def add(self, errors: Iterable[RowError]) -> None:
        """Add errors that do not stop the reading: those of images that are skipped, or of rows dropped earlier."""
        for error in errors:
            is_listed = error.rows == 1 and self._listed[error.rule] < LISTED
            if is_listed:
                self._listed[error.rule] += 1
                self.found.append(error)
            self._count(error.file, error.rule, error.rows, unlisted=0 if is_listed else error.rows)

    def _count(self, file: str, rule: str, rows: int, *, unlisted: int) -> None:
        self.count += rows
        if unlisted:
            earlier = self._unlisted.get(rule)
            unlisted += earlier.rows if earlier else 0
            name = file if earlier is None or earlier.file == file else "several files"
            self._unlisted[rule] = RowError(name, 0, rule, f"{unlisted:,} more", unlisted)

    def settle(self) -> None:
        """Raise DataError with a list of the first errors, unless rows are to be dropped."""
        if self.found and self.on_bad_row == "stop":
            first = "\n  ".join(map(str, self.found[:SHOWN]))
            more = f"\n  and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
            broken = "1 row breaks" if self.count == 1 else f"{self.count:,} rows break"
            raise DataError(
                f"{broken} a rule:\n  {first}{more}\n"
                + "".join(f"{hint}\n" for hint in self.hints)
                + f"Fix the file, or give on_bad_row=drop to leave {'it' if self.count == 1 else 'them'} out."
            )

    def frame(self) -> pd.DataFrame:
        """The errors as :func:`errors_frame`; of a rule with too many the last row counts the others."""
        return errors_frame([*self.found, *self._unlisted.values()])


def row_hashes(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """``[R]`` 64-bit hashes of rows of numbers, given by their columns ``[R]``: equal rows have equal ones."""
    hashes = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        # Adding 0 turns -0 into 0, which is equal but has other bits.
        hashes = (hashes ^ (column + 0.0).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


@dataclass(frozen=True)
class Frame:
    """A table in memory that is read and verified like a file; errors give its name and count its rows from 1."""

    name: str
    data: pd.DataFrame


Source = Path | Frame


@dataclass(frozen=True)
class TextColumn:
    """A text column: row r holds ``values[codes[r]]``."""

    codes: NDArray[np.int32]
    values: pa.StringArray
    """The distinct texts; some may be unused."""

    def __getitem__(self, row: int) -> str:
        return str(self.values[int(self.codes[row])].as_py())

    def used(self) -> pa.StringArray:
        """The distinct values that occur in the rows."""
        return self.values.filter(pa.array(self._is_used()))

    def compact(self) -> TextColumn:
        """The same texts, without the values that are not used."""
        is_used = self._is_used()
        codes = (np.cumsum(is_used) - 1).astype(np.int32)[self.codes]
        return TextColumn(codes, self.values.filter(pa.array(is_used)))

    def mapped(self, values: pa.StringArray) -> TextColumn:
        """The column with other texts, given for each of ``values``; equal ones become one."""
        again = TextColumn.encode(pa.chunked_array([values], type=pa.string()))
        return TextColumn(again.codes[self.codes], again.values)

    def _is_used(self) -> NDArray[np.bool_]:
        return np.bincount(self.codes, minlength=len(self.values)) > 0

    def numbers(self) -> NDArray[np.float64]:
        """``[R]`` the numbers that the texts are; NaN where a text is no number."""
        try:
            values = self.values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            values = pd.to_numeric(self.values.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
        return np.asarray(values[self.codes], dtype=np.float64)

    @staticmethod
    def encode(column: pa.ChunkedArray) -> TextColumn:
        """The codes and distinct values of an Arrow text column."""
        encoded = pa_compute.dictionary_encode(column).combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # no chunk at all
            return TextColumn(np.zeros(0, dtype=np.int32), pa.array([], pa.string()))
        return TextColumn(encoded.indices.to_numpy(), encoded.dictionary)

    @staticmethod
    def join(columns: Sequence[TextColumn]) -> TextColumn:
        """Several columns as one."""
        if len(columns) == 1:
            return columns[0]
        values = TextColumn.encode(pa.chunked_array([column.values for column in columns], type=pa.string()))
        first = np.cumsum([0, *(len(column.values) for column in columns)])
        codes = [values.codes[start:][column.codes] for start, column in zip(first, columns, strict=False)]
        return TextColumn(np.concatenate(codes) if codes else np.zeros(0, dtype=np.int32), values.values)


@dataclass(frozen=True)
class Table:
    """Columns of one file with R rows: ``columns`` of numbers ``[R]``, and ``texts``."""

    path: Path
    columns: dict[str, NDArray[Any]]
    texts: dict[str, TextColumn]
    lines: NDArray[np.int64]
    """``[R]`` line of each row in the file (the header is line 1); of a Parquet file or frame its number, from 1."""

    def __len__(self) -> int:
        return len(self.lines)

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> Table:
        """The table with more columns of numbers."""
        return replace(self, columns={**self.columns, **columns})

    def take(self, rows: NDArray[np.bool_]) -> Table:
        """The rows where ``rows [R]`` is True."""
        return Table(
            self.path,
            {name: column[rows] for name, column in self.columns.items()},
            {name: TextColumn(texts.codes[rows], texts.values) for name, texts in self.texts.items()},
            self.lines[rows],
        )

    def require(self, valid: NDArray[np.bool_], rule: str, values: Sequence[str], errors: RowErrors) -> Table:
        """The rows where ``valid`` holds; the others become errors that show the named columns."""
        if valid.all():
            return self
        wrong = np.flatnonzero(~valid)
        errors.note(self.path.name, rule, self.lines[wrong], lambda number: self.shown(int(wrong[number]), values))
        return self.take(valid)

    def shown(self, row: int, names: Sequence[str]) -> str:
        """The named columns of a row, long texts cut."""
        values = {name: str((self.texts.get(name) or self.columns[name])[row]) for name in names}
        return ", ".join(f"{name}={shown(value, quotes=False)}" for name, value in values.items())

    @staticmethod
    def join(tables: Sequence[Table]) -> Table:
        """Tables with the same columns, one below the other; at least one."""
        if len(tables) == 1:
            return tables[0]
        first = tables[0]
        return Table(
            first.path,
            {name: np.concatenate([table.columns[name] for table in tables]) for name in first.columns},
            {name: TextColumn.join([table.texts[name] for table in tables]) for name in first.texts},
            np.concatenate([table.lines for table in tables]),
        )
