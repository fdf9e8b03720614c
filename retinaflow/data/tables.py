"""CSV and Parquet files -> numpy columns with line numbers, and the errors of their rows.

A file is read by one threaded pyarrow call. Only when that fails (text in a number column, a row cut short) the file is
read again as text to find the rows with errors. An error names file, line (of a Parquet file: row), rule and value.
Errors stop the reading with a list of the first ones, or the rows are dropped and listed (``on_bad_row=drop``).

No row becomes a Python object: text columns are codes into their distinct values (:class:`TextColumn`), and lines are
counted only when an error needs them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from retinaflow.data.text_lines import count_lines, filled_lines, flaw_of, has_rows, lines_of_csv
from retinaflow.errors import DataError
from retinaflow.settings.data_settings import OnBadRow

SHOWN = 5
"""Errors listed in a message."""
_BLOCK = 1 << 23
"""Bytes of a CSV file that one thread reads at a time."""


class RowError(NamedTuple):
    """A row that breaks a rule."""

    file: str
    line: int
    """From 1; 0 where ``file`` names more than a file (``train.json annotation 7``)."""
    rule: str
    value: str

    def __str__(self) -> str:
        where = f"{self.file} line {self.line}" if self.line else self.file
        return f"{where}: {self.rule}, but got {self.value}"


@dataclass
class RowErrors:
    """Collects errors; :meth:`settle` raises the first of them, or lets the reading continue without those rows."""

    on_bad_row: OnBadRow = "stop"
    found: list[RowError] = field(default_factory=list)
    """All errors; when they stop the reading, of each rule and file only the first :data:`SHOWN`."""
    count: int = 0
    """All errors, listed or not."""

    def note(self, file: str, rule: str, lines: NDArray[np.int64], value: Callable[[int], str]) -> None:
        """Add rows of a file that break a rule; ``value(n)`` describes the n-th of them."""
        self.count += len(lines)
        listed = lines if self.on_bad_row == "drop" else lines[:SHOWN]
        self.found += [RowError(file, int(line), rule, value(n)) for n, line in enumerate(listed)]

    def settle(self) -> None:
        """Raise DataError with a list of the first errors, unless rows are to be dropped."""
        if self.found and self.on_bad_row == "stop":
            first = "\n  ".join(map(str, self.found[:SHOWN]))
            more = f"\n  and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
            broken = "1 row breaks" if self.count == 1 else f"{self.count:,} rows break"
            raise DataError(
                f"{broken} a rule:\n  {first}{more}\n"
                f"Fix the file, or give on_bad_row=drop to leave {'it' if self.count == 1 else 'them'} out."
            )

    def frame(self) -> pd.DataFrame:
        """Columns file, line, rule, value: what is written as ``dropped.csv``."""
        return pd.DataFrame(self.found, columns=list(RowError._fields))


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
        return self.values.filter(pa.array(np.bincount(self.codes, minlength=len(self.values)) > 0))

    @staticmethod
    def encode(column: pa.ChunkedArray) -> TextColumn:
        """The codes and distinct values of an Arrow text column."""
        encoded = pa_compute.dictionary_encode(column).combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # no chunk at all
            return TextColumn(np.zeros(0, dtype=np.int32), pa.array([], pa.string()))
        return TextColumn(encoded.indices.to_numpy(), encoded.dictionary)


@dataclass(frozen=True)
class Table:
    """Columns of one file with R rows: ``columns`` of numbers ``[R]``, and ``texts``."""

    path: Path
    columns: dict[str, NDArray[Any]]
    texts: dict[str, TextColumn]
    rows: NDArray[np.int64]
    """``[R]`` position of each row among all rows of the file, from 0."""
    lines_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    """Positions of rows -> their lines in the file (the header is line 1)."""

    def __len__(self) -> int:
        return len(self.rows)

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> Table:
        """The table with more columns of numbers."""
        return replace(self, columns={**self.columns, **columns})

    def require(self, valid: NDArray[np.bool_], rule: str, values: Sequence[str], errors: RowErrors) -> Table:
        """The rows where ``valid`` holds; the others become errors that show the named columns."""
        if valid.all():
            return self
        wrong = np.flatnonzero(~valid)

        def shown(number: int) -> str:
            row = int(wrong[number])
            return ", ".join(f"{name}={(self.texts.get(name) or self.columns[name])[row]}" for name in values)

        errors.note(self.path.name, rule, self.lines_of(self.rows[wrong]), shown)
        return Table(
            self.path,
            {name: column[valid] for name, column in self.columns.items()},
            {name: TextColumn(texts.codes[valid], texts.values) for name, texts in self.texts.items()},
            self.rows[valid],
            self.lines_of,
        )


def read_table(
    source: Source, *, text: Sequence[str], numbers: Sequence[str], optional: Mapping[str, float], errors: RowErrors
) -> Table:
    """The named columns of a CSV or Parquet file, found by header name: ``text`` as texts, the others as float64.

    ``optional`` columns that the file lacks are filled with their value. Raises DataError for a file that is missing or
    empty, and for a column that is missing or repeated.
    """
    path = Path(source.name) if isinstance(source, Frame) else source
    header = [str(name) for name in source.data.columns] if isinstance(source, Frame) else header_of(path)
    wanted = [*text, *numbers]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataError(
            f"{path} line 1: the header must name {', '.join(wanted)}, but lacks {', '.join(missing)}; got {header}"
        )
    present = wanted + [name for name in optional if name in header]
    twice = sorted({name for name in present if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} line 1: a column must be named once, but {', '.join(twice)} is named twice")
    types = {name: pa.string() if name in text else pa.float64() for name in present}
    if isinstance(source, Frame):
        table = _table(path, _read_frame(source, types), None, lambda rows: rows + 1)
    else:
        table = _read(path, header, types, errors)
    for name in [*numbers, *(name for name in optional if name in present)]:
        table = table.require(np.isfinite(table.columns[name]), f"{name} must be a number", [name], errors)
    return table.with_columns({name: np.full(len(table), optional[name]) for name in optional if name not in present})


def header_of(path: Path) -> list[str]:
    """The column names of a CSV or Parquet file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        try:
            return list(pa_parquet.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline().strip()
    try:
        names = next(csv.reader([first]), [])
    except csv.Error as error:
        raise DataError(f"{path} line 1: the header must be a line of CSV, but is not: {error}") from None
    if not names:
        raise DataError(f"{path}: the file must begin with a header line, but is empty or begins with a blank line")
    return [name.strip() for name in names]


def _read(path: Path, header: list[str], types: dict[str, pa.DataType], errors: RowErrors) -> Table:
    if path.suffix == ".parquet":
        return _table(path, _read_parquet(path, types), None, lambda rows: rows + 1)
    if not has_rows(path):
        return _table(path, pa.schema(types).empty_table(), None, lambda rows: rows + 2)
    # Our own reading of the header removes spaces around the names.
    options = pa_csv.ReadOptions(column_names=header, skip_rows=1, block_size=_BLOCK)
    convert = pa_csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        arrow = pa_csv.read_csv(path, read_options=options, convert_options=convert)
    except pa.ArrowInvalid:
        return _read_carefully(path, header, types, errors)
    # The reader takes all lines after an open quote as one field, without an error.
    if count_lines(path) != arrow.num_rows + 1 and len(filled_lines(path)) != arrow.num_rows:
        return _read_carefully(path, header, types, errors)
    return _table(path, arrow, None, lines_of_csv(path, arrow.num_rows))


def _table(
    path: Path, arrow: pa.Table, rows: NDArray[np.int64] | None, lines_of: Callable[[NDArray[np.int64]], Any]
) -> Table:
    is_text = {name: pa.types.is_string(arrow.schema.field(name).type) for name in arrow.column_names}
    return Table(
        path,
        {name: arrow[name].to_numpy() for name, text in is_text.items() if not text},
        {name: TextColumn.encode(arrow[name]) for name, text in is_text.items() if text},
        np.arange(arrow.num_rows, dtype=np.int64) if rows is None else rows,
        lines_of,
    )


def _read_parquet(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = pa_parquet.read_table(path, columns=list(types))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    return _cast(str(path), table, types)


def _read_frame(source: Frame, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = pa.Table.from_pandas(source.data[list(types)], preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{source.name}: a column must hold values of one kind, but {error}") from None
    return _cast(source.name, table, types)


def _cast(name: str, table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = table.select(list(types)).cast(pa.schema(types))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{name}: a column must hold the type that its name requires: {error}") from None
    for position, (name, kind) in enumerate(types.items()):
        if kind == pa.string():
            table = table.set_column(position, name, table[name].fill_null(""))
    return table


def _read_carefully(path: Path, header: list[str], types: dict[str, pa.DataType], errors: RowErrors) -> Table:
    """Read all columns as text, in one thread and line by line, so that each row with an error can be named."""
    lines = filled_lines(path)
    flaws = [flaw_of(line) for _, line in lines]
    for rule in sorted({flaw for flaw in flaws if flaw}):
        found = [line for line, flaw in zip(lines, flaws, strict=True) if flaw == rule]
        shown = [line.decode(errors="replace")[:60] for _, line in found]
        errors.note(path.name, rule, np.array([number for number, _ in found]), shown.__getitem__)
    good = [line for line, flaw in zip(lines, flaws, strict=True) if not flaw]
    numbers_of = np.array([number for number, _ in good], dtype=np.int64)
    content = b"\n".join(line for _, line in good)
    cut: list[tuple[int, int]] = []

    def note(row: Any) -> str:
        cut.append((int(row.number) - 1, row.actual_columns))
        return "skip"

    as_text = dict.fromkeys(types, pa.string())
    try:
        arrow = (
            pa_csv.read_csv(
                pa.BufferReader(content),
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=header),
                parse_options=pa_csv.ParseOptions(invalid_row_handler=note),
                convert_options=pa_csv.ConvertOptions(column_types=as_text, include_columns=list(types)),
            )
            if content
            else pa.schema(as_text).empty_table()
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable CSV file: {error}") from None
    cut_rows = np.array([row for row, _ in cut], dtype=np.int64)

    def lines_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers_of[rows]

    if cut:
        rule = f"a row must have {len(header)} fields"
        errors.note(path.name, rule, lines_of(cut_rows), lambda n: f"fields={cut[n][1]}")
    table = _table(path, arrow, np.delete(np.arange(arrow.num_rows + len(cut)), cut_rows), lines_of)
    numbers = {name: _numbers(table.texts[name]) for name, kind in types.items() if kind != pa.string()}
    for name in numbers:
        unread = np.isnan(numbers[name])
        table = table.require(~unread, f"{name} must be a number", [name], errors)
        numbers = {other: column[~unread] for other, column in numbers.items()}
    texts = {name: column for name, column in table.texts.items() if name not in numbers}
    return Table(path, numbers, texts, table.rows, lines_of)


def _numbers(texts: TextColumn) -> NDArray[np.float64]:
    """The numbers in a text column; NaN where the text is no number."""
    values = pd.to_numeric(texts.values.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
    return np.asarray(values[texts.codes], dtype=np.float64)
