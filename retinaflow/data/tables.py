"""CSV and Parquet files -> numpy columns with line numbers, and the faults of their rows.

The fast way is one threaded pyarrow read. Only when that fails (text in a number column, a row cut short) is the file
read again as text to find and name the faulty rows. A fault names file, line (of a Parquet file: row), rule and value;
faults either stop the reading, the first ones listed, or are counted and kept (``on_bad_row=drop``), never passed over
in silence.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

OnBadRow = Literal["stop", "drop"]
SHOWN = 5
"""Faults listed in an error message."""


class Fault(NamedTuple):
    """One rule broken at one place."""

    file: str
    line: int
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.rule}, but got {self.value}"


@dataclass
class Faults:
    """Collects faults; :meth:`settle` stops with the first of them or lets the reading go on without those rows."""

    on_bad_row: OnBadRow = "stop"
    found: list[Fault] = field(default_factory=list)

    def settle(self) -> None:
        """Raise ValueError listing the first faults, unless rows are to be dropped."""
        if self.found and self.on_bad_row == "stop":
            first = "\n  ".join(map(str, self.found[:SHOWN]))
            more = f"\n  and {len(self.found) - SHOWN:,} more" if len(self.found) > SHOWN else ""
            raise ValueError(
                f"{len(self.found):,} rows break a rule:\n  {first}{more}\n"
                "Mend the file, or give on_bad_row=drop to go on without them."
            )

    def frame(self) -> pd.DataFrame:
        """Columns file, line, rule, value: what is written as ``dropped.csv``."""
        return pd.DataFrame(self.found, columns=list(Fault._fields))


@dataclass(frozen=True)
class Table:
    """Columns of one file; ``lines [R]`` is the line of each row in the file (the header is line 1)."""

    path: Path
    columns: dict[str, NDArray[Any]]
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lines)

    def with_column(self, name: str, column: NDArray[Any]) -> Table:
        """The table with one more column."""
        return replace(self, columns=self.columns | {name: column})

    def require(self, kept: NDArray[np.bool_], rule: str, values: Sequence[str], faults: Faults) -> Table:
        """The rows where ``kept`` holds; the others become faults that show the named columns."""
        if kept.all():
            return self
        for row in np.flatnonzero(~kept):
            shown = ", ".join(f"{name}={self.columns[name][row]}" for name in values)
            faults.found.append(Fault(self.path.name, int(self.lines[row]), rule, shown))
        return Table(self.path, {name: column[kept] for name, column in self.columns.items()}, self.lines[kept])


def read_table(
    path: Path, *, text: Sequence[str], numbers: Sequence[str], optional: Mapping[str, float], faults: Faults
) -> Table:
    """The named columns of a CSV or Parquet file, found by header name: ``text`` as objects, the rest float64.

    ``optional`` columns that the file lacks are filled with their value. Raises FileNotFoundError, and ValueError for
    an empty file, a missing column or a column given twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    header = _header(path)
    wanted = [*text, *numbers]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(
            f"{path} line 1: the header must name {', '.join(wanted)}, but lacks {', '.join(missing)}; got {header}"
        )
    present = wanted + [name for name in optional if name in header]
    twice = sorted({name for name in present if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path} line 1: a column must be named once, but {', '.join(twice)} stands twice")
    arrow, lines = _read(path, header, present, set(text), faults)
    columns: dict[str, NDArray[Any]] = {}
    for name in [*wanted, *optional]:
        if name not in present:
            columns[name] = np.full(arrow.num_rows, optional[name])
        elif name in text:
            columns[name] = arrow[name].to_numpy()
        else:
            columns[name] = arrow[name].to_numpy().astype(np.float64)
    table = Table(path, columns, lines)
    for name in [*numbers, *(name for name in optional if name in present)]:
        table = table.require(np.isfinite(table.columns[name]), f"{name} must be a number", [name], faults)
    return table


def _header(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        try:
            return list(pa_parquet.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        names = next(csv.reader([file.readline().strip()]), [])
    if not names:
        raise ValueError(f"{path}: the file must begin with a header line, but is empty or begins with a blank line")
    return [name.strip() for name in names]


def _read(
    path: Path, header: list[str], present: list[str], text: set[str], faults: Faults
) -> tuple[pa.Table, NDArray[np.int64]]:
    types = {name: pa.string() if name in text else pa.float64() for name in present}
    if path.suffix == ".parquet":
        return _read_parquet(path, types)
    if _count_lines(path) == 1:
        return pa.schema(types).empty_table(), np.zeros(0, dtype=np.int64)
    # The names come from our own reading of the header, which forgives spaces around them.
    options = pa_csv.ReadOptions(column_names=header, skip_rows=1)
    convert = pa_csv.ConvertOptions(column_types=types, include_columns=present)
    try:
        table = pa_csv.read_csv(path, read_options=options, convert_options=convert)
    except pa.ArrowInvalid:
        return _read_carefully(path, header, present, text, faults)
    return table, _line_numbers(path, table.num_rows)


def _read_parquet(path: Path, types: dict[str, pa.DataType]) -> tuple[pa.Table, NDArray[np.int64]]:
    try:
        table = pa_parquet.read_table(path, columns=list(types)).select(list(types)).cast(pa.schema(types))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: a column does not hold what its name says: {error}") from None
    for place, (name, kind) in enumerate(types.items()):
        if kind == pa.string():
            table = table.set_column(place, name, table[name].fill_null(""))
    return table, np.arange(table.num_rows, dtype=np.int64) + 1


def _read_carefully(
    path: Path, header: list[str], present: list[str], text: set[str], faults: Faults
) -> tuple[pa.Table, NDArray[np.int64]]:
    """Everything as text, one thread, so that each bad row can be named."""
    cut: list[tuple[int, int]] = []

    def note(row: Any) -> str:
        cut.append((int(row.number) - 2, row.actual_columns))
        return "skip"

    try:
        table = pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(use_threads=False, column_names=header, skip_rows=1),
            parse_options=pa_csv.ParseOptions(invalid_row_handler=note),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(present, pa.string()), include_columns=present
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable CSV file: {error}") from None
    lines = _line_numbers(path, table.num_rows + len(cut))
    rule = f"a row must have {len(header)} fields"
    faults.found += [Fault(path.name, int(lines[row]), rule, f"fields={fields}") for row, fields in cut]
    lines = np.delete(lines, [row for row, _ in cut])
    columns: dict[str, Any] = {}
    good = np.ones(table.num_rows, dtype=bool)
    for name in present:
        values = table[name].to_pandas()
        columns[name] = values.to_numpy()
        if name not in text:
            numeric = columns[name] = pd.to_numeric(values, errors="coerce").astype(np.float64).to_numpy()
            for row in np.flatnonzero(np.isnan(numeric) & good):
                found = f"{name}={values.iloc[row]}"
                faults.found.append(Fault(path.name, int(lines[row]), f"{name} must be a number", found))
            good &= ~np.isnan(numeric)
    return pa.table({name: column[good] for name, column in columns.items()}), lines[good]


def _line_numbers(path: Path, rows: int) -> NDArray[np.int64]:
    """The line of each row below the header, where the reader has passed over blank lines."""
    if _count_lines(path) != rows + 1:
        with path.open("rb") as file:
            filled = [number for number, line in enumerate(file, 1) if line.strip(b"\r\n")]
        if len(filled) == rows + 1:
            return np.array(filled[1:], dtype=np.int64)
    return np.arange(rows, dtype=np.int64) + 2


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
