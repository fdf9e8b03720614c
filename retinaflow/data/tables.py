"""CSV and Parquet files -> numpy columns with line numbers, and the errors of their rows.

The fast way is one threaded pyarrow read. Only when that fails (text in a number column, a row cut short) is the file
read again as text to find and name the faulty rows. A fault names file, line (of a Parquet file: row), rule and value;
errors either stop the reading, the first ones listed, or are counted and kept (``on_bad_row=drop``), never passed over
in silence.

No row becomes a Python object: text columns are codes into their distinct values (:class:`Words`), and lines are
counted only when a fault asks for them.
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

from retinaflow.data.csv_lines import count_lines, filled_lines, flaw_of, has_rows, lines_of_csv
from retinaflow.errors import DataError
from retinaflow.settings.groups import OnBadRow

SHOWN = 5
"""Faults listed in an error message."""
_BLOCK = 1 << 23
"""Bytes of a CSV file that one thread reads at a time."""


class RowError(NamedTuple):
    """One rule broken at one place."""

    file: str
    line: int
    """From 1; 0 where ``file`` names the whole place (``train.json annotation 7``)."""
    rule: str
    value: str

    def __str__(self) -> str:
        place = f"{self.file} line {self.line}" if self.line else self.file
        return f"{place}: {self.rule}, but got {self.value}"


@dataclass
class RowErrors:
    """Collects errors; :meth:`settle` stops with the first of them or lets the reading go on without those rows."""

    on_bad_row: OnBadRow = "stop"
    found: list[RowError] = field(default_factory=list)
    """All errors; when they stop the reading, of each rule and file only the first :data:`SHOWN`."""
    count: int = 0
    """All errors, listed or not."""

    def note(self, file: str, rule: str, lines: NDArray[np.int64], value: Callable[[int], str]) -> None:
        """Rows of a file break a rule; ``value(n)`` tells what the n-th of them holds."""
        self.count += len(lines)
        listed = lines if self.on_bad_row == "drop" else lines[:SHOWN]
        self.found += [RowError(file, int(line), rule, value(n)) for n, line in enumerate(listed)]

    def settle(self) -> None:
        """Raise ValueError listing the first errors, unless rows are to be dropped."""
        if self.found and self.on_bad_row == "stop":
            first = "\n  ".join(map(str, self.found[:SHOWN]))
            more = f"\n  and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
            broken = "1 row breaks" if self.count == 1 else f"{self.count:,} rows break"
            raise DataError(
                f"{broken} a rule:\n  {first}{more}\n"
                f"Mend the file, or give on_bad_row=drop to go on without {'it' if self.count == 1 else 'them'}."
            )

    def frame(self) -> pd.DataFrame:
        """Columns file, line, rule, value: what is written as ``dropped.csv``."""
        return pd.DataFrame(self.found, columns=list(RowError._fields))


@dataclass(frozen=True)
class Frame:
    """A table that is in memory already, read and checked like a file; errors name it and count its rows from 1."""

    name: str
    data: pd.DataFrame


Source = Path | Frame


@dataclass(frozen=True)
class Words:
    """A text column: row r holds ``values[codes[r]]``."""

    codes: NDArray[np.int32]
    values: pa.StringArray
    """The distinct texts; not all need be used."""

    def __getitem__(self, row: int) -> str:
        return str(self.values[int(self.codes[row])].as_py())

    def used(self) -> pa.StringArray:
        """The distinct values of the rows that there are."""
        return self.values.filter(pa.array(np.bincount(self.codes, minlength=len(self.values)) > 0))

    @staticmethod
    def encode(column: pa.ChunkedArray) -> Words:
        """The codes and distinct values of an Arrow text column."""
        encoded = pa_compute.dictionary_encode(column).combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # no chunk at all
            return Words(np.zeros(0, dtype=np.int32), pa.array([], pa.string()))
        return Words(encoded.indices.to_numpy(), encoded.dictionary)


@dataclass(frozen=True)
class Table:
    """Columns of one file with R rows: ``columns`` of numbers ``[R]`` and ``words`` of text."""

    path: Path
    columns: dict[str, NDArray[Any]]
    words: dict[str, Words]
    rows: NDArray[np.int64]
    """``[R]`` place of each row among all rows of the file, from 0."""
    lines_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    """Places of rows -> their lines in the file (the header is line 1)."""

    def __len__(self) -> int:
        return len(self.rows)

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> Table:
        """The table with more columns of numbers."""
        return replace(self, columns={**self.columns, **columns})

    def require(self, kept: NDArray[np.bool_], rule: str, values: Sequence[str], errors: RowErrors) -> Table:
        """The rows where ``kept`` holds; the others become errors that show the named columns."""
        if kept.all():
            return self
        wrong = np.flatnonzero(~kept)

        def shown(number: int) -> str:
            row = int(wrong[number])
            return ", ".join(f"{name}={(self.words.get(name) or self.columns[name])[row]}" for name in values)

        errors.note(self.path.name, rule, self.lines_of(self.rows[wrong]), shown)
        return Table(
            self.path,
            {name: column[kept] for name, column in self.columns.items()},
            {name: Words(words.codes[kept], words.values) for name, words in self.words.items()},
            self.rows[kept],
            self.lines_of,
        )


def read_table(
    source: Source, *, text: Sequence[str], numbers: Sequence[str], optional: Mapping[str, float], errors: RowErrors
) -> Table:
    """The named columns of a CSV or Parquet file, found by header name: ``text`` as words, the rest float64.

    ``optional`` columns that the file lacks are filled with their value. Raises FileNotFoundError, and ValueError for
    an empty file, a missing column or a column given twice.
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
        raise DataError(f"{path} line 1: a column must be named once, but {', '.join(twice)} stands twice")
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
    # The names come from our own reading of the header, which forgives spaces around them.
    options = pa_csv.ReadOptions(column_names=header, skip_rows=1, block_size=_BLOCK)
    convert = pa_csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        arrow = pa_csv.read_csv(path, read_options=options, convert_options=convert)
    except pa.ArrowInvalid:
        return _read_carefully(path, header, types, errors)
    # An open quote swallows the lines up to the next one, and is no error to the reader.
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
        {name: Words.encode(arrow[name]) for name, text in is_text.items() if text},
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
        raise DataError(f"{name}: a column does not hold what its name says: {error}") from None
    for place, (name, kind) in enumerate(types.items()):
        if kind == pa.string():
            table = table.set_column(place, name, table[name].fill_null(""))
    return table


def _read_carefully(path: Path, header: list[str], types: dict[str, pa.DataType], errors: RowErrors) -> Table:
    """Everything as text, one thread, line by line as far as quotes go, so that each bad row can be named."""
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
    places = np.array([row for row, _ in cut], dtype=np.int64)

    def lines_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers_of[rows]

    if cut:
        rule = f"a row must have {len(header)} fields"
        errors.note(path.name, rule, lines_of(places), lambda n: f"fields={cut[n][1]}")
    table = _table(path, arrow, np.delete(np.arange(arrow.num_rows + len(cut)), places), lines_of)
    numbers = {name: _numbers(table.words[name]) for name, kind in types.items() if kind != pa.string()}
    for name in numbers:
        unread = np.isnan(numbers[name])
        table = table.require(~unread, f"{name} must be a number", [name], errors)
        numbers = {other: column[~unread] for other, column in numbers.items()}
    words = {name: column for name, column in table.words.items() if name not in numbers}
    return Table(path, numbers, words, table.rows, lines_of)


def _numbers(words: Words) -> NDArray[np.float64]:
    """NaN where the text is no number."""
    values = pd.to_numeric(words.values.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
    return np.asarray(values[words.codes], dtype=np.float64)
