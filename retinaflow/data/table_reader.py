"""CSV and Parquet files and frames -> :class:`~retinaflow.data.tables.Table`.

A file is read in blocks, and what a caller does not want of a block is gone before the next one is read: memory is
bounded by the rows that stay. A block of a CSV file is parsed by one threaded pyarrow call. Only when that fails (text
in a number column, a row cut short) the block is parsed again as text to find the rows with errors.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from retinaflow.data.tables import Frame, RowErrors, Source, Table, TextColumn
from retinaflow.data.text_lines import LineBlock, flaw_of, line_blocks
from retinaflow.errors import DataError, shown

_OTHER_LINE_ENDS = re.compile("[\v\x85\u2028\u2029]")
_PARSED = 1 << 22
"""Bytes of a block that one thread parses at a time."""
_PARQUET_ROWS = 1 << 19
_NO_CHECK: Callable[[Table], Table] = lambda table: table  # noqa: E731


def read_table(
    source: Source,
    *,
    text: Sequence[str],
    numbers: Sequence[str],
    optional: Mapping[str, float | str],
    errors: RowErrors,
    check: Callable[[Table], Table] = _NO_CHECK,
) -> Table:
    """The named columns of a CSV or Parquet file, found by header name: ``text`` as texts, the others as float64.

    ``optional`` columns that the file lacks are filled with their value; one whose value is a text holds texts.
    ``check`` is given each block of rows and returns the rows to keep. Raises DataError for a file that is missing or
    empty, and for a column that is missing or repeated.
    """
    path = Path(source.name) if isinstance(source, Frame) else source
    header = [str(name) for name in source.data.columns] if isinstance(source, Frame) else header_of(path)
    wanted = [*text, *numbers]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataError(
            f"{path} line 1: the header must name {', '.join(wanted)}, but lacks {', '.join(missing)}; "
            f"got {shown(header, limit=300)}"
        )
    present = wanted + [name for name in optional if name in header]
    twice = sorted({name for name in present if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} line 1: a column must be named once, but {', '.join(twice)} is named twice")
    is_text = {*text, *(name for name, value in optional.items() if isinstance(value, str))}
    types = {name: pa.string() if name in is_text else pa.float64() for name in present}
    parts: list[Table] = []
    for part in _blocks(source, path, header, types, errors):
        for name in (name for name in present if name not in is_text):
            part = part.require(np.isfinite(part.columns[name]), f"{name} must be a number", [name], errors)
        rows = len(part)
        part = check(_filled(part, {name: value for name, value in optional.items() if name not in present}))
        if parts and len(part) < rows / 2:
            part = Table(part.path, part.columns, {k: texts.compact() for k, texts in part.texts.items()}, part.lines)
        if len(part) or not parts:
            parts.append(part)
    return Table.join(parts)


def _filled(table: Table, values: Mapping[str, float | str]) -> Table:
    zeros = np.zeros(len(table), dtype=np.int32)
    texts = {name: TextColumn(zeros, pa.array([value])) for name, value in values.items() if isinstance(value, str)}
    numbers = {name: np.full(len(table), value) for name, value in values.items() if not isinstance(value, str)}
    return Table(table.path, {**table.columns, **numbers}, {**table.texts, **texts}, table.lines)


def header_of(path: Path) -> list[str]:
    """The column names of a CSV or Parquet file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        try:
            return list(pa_parquet.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    first = next((block.content.partition(b"\n")[0] for block in line_blocks(path)), b"").decode(errors="replace")
    if "\0" in first:
        raise DataError(f"{path} line 1: the file must be text in UTF-8, but holds zero bytes; save it as UTF-8")
    if other := _OTHER_LINE_ENDS.search(first):
        # The whole file would be its header, and read as empty.
        raise DataError(f"{path} line 1: lines must end with LF or CR, but a line of the header ends with {other[0]!a}")
    try:
        names = next(csv.reader([first.strip()]), [])
    except csv.Error as error:
        raise DataError(f"{path} line 1: the header must be a line of CSV, but is not: {error}") from None
    if not names:
        raise DataError(f"{path}: the file must begin with a header line, but is empty or begins with a blank line")
    return [name.strip() for name in names]


def _blocks(
    source: Source, path: Path, header: list[str], types: dict[str, pa.DataType], errors: RowErrors
) -> Iterator[Table]:
    """The rows in blocks; at least one, which may be empty."""
    yield _table(path, pa.schema(types).empty_table(), np.zeros(0, dtype=np.int64))
    if isinstance(source, Frame):
        yield _numbered(path, _cast(source.name, _arrow_of(source, types), types), 0)
    elif path.suffix == ".parquet":
        yield from _parquet_blocks(path, types)
    else:
        for block in line_blocks(path):
            # The header is read on its own, which removes spaces around the names.
            content = block.content.partition(b"\n")[2] if block.first_line == 1 else block.content
            if content:
                yield _parse(path, LineBlock(max(block.first_line, 2), content), header, types, errors)


def _parse(path: Path, block: LineBlock, header: list[str], types: dict[str, pa.DataType], errors: RowErrors) -> Table:
    try:
        arrow = pa_csv.read_csv(
            pa.BufferReader(block.content),
            read_options=pa_csv.ReadOptions(column_names=header, block_size=_PARSED),
            convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
    except pa.ArrowInvalid:
        return _parse_carefully(path, block, header, types, errors)
    if arrow.num_rows == block.count:
        return _table(path, arrow, block.first_line + np.arange(arrow.num_rows, dtype=np.int64))
    filled = np.array([number for number, line in block.lines() if line], dtype=np.int64)
    # The reader skips blank lines. It also takes all lines after an open quote as one field, without an error.
    if len(filled) == arrow.num_rows:
        return _table(path, arrow, filled)
    return _parse_carefully(path, block, header, types, errors)


def _parse_carefully(
    path: Path, block: LineBlock, header: list[str], types: dict[str, pa.DataType], errors: RowErrors
) -> Table:
    """Parse all columns as text, in one thread and line by line, so that each row with an error can be named."""
    lines = [(number, line) for number, line in block.lines() if line]
    flaws = [flaw_of(line) for _, line in lines] if block.may_have_flaws() else [None] * len(lines)
    for rule in sorted({flaw for flaw in flaws if flaw}):
        found = [line for line, flaw in zip(lines, flaws, strict=True) if flaw == rule]
        numbers_of_found = np.array([number for number, _ in found])
        errors.note(path.name, rule, numbers_of_found, lambda n, found=found: found[n][1].decode(errors="replace")[:60])  # type: ignore[misc]
    good = [line for line, flaw in zip(lines, flaws, strict=True) if not flaw]
    numbers_of = np.array([number for number, _ in good], dtype=np.int64)
    content = b"\n".join(line for _, line in good)
    del lines, flaws, good
    cut: list[tuple[int, int]] = []

    def note(row: Any) -> str:
        cut.append((int(row.number) - 1, row.actual_columns))
        return "skip"

    as_text = dict.fromkeys(types, pa.string())
    try:
        arrow = (
            pa_csv.read_csv(
                pa.BufferReader(content),
                # One block, since a row may be longer than the usual blocks.
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=header, block_size=len(content) + 1),
                parse_options=pa_csv.ParseOptions(invalid_row_handler=note),
                convert_options=pa_csv.ConvertOptions(column_types=as_text, include_columns=list(types)),
            )
            if content
            else pa.schema(as_text).empty_table()
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable CSV file: {error}") from None
    cut_rows = np.array([row for row, _ in cut], dtype=np.int64)
    if cut:
        rule = f"a row must have {len(header)} fields"
        errors.note(path.name, rule, numbers_of[cut_rows], lambda n: f"fields={cut[n][1]}")
    table = _table(path, arrow, np.delete(numbers_of, cut_rows))
    numbers = {name: table.texts[name].numbers() for name, kind in types.items() if kind != pa.string()}
    for name in numbers:
        unread = np.isnan(numbers[name])
        table = table.require(~unread, f"{name} must be a number", [name], errors)
        numbers = {other: column[~unread] for other, column in numbers.items()}
    texts = {name: column for name, column in table.texts.items() if name not in numbers}
    return Table(path, numbers, texts, table.lines)


def _table(path: Path, arrow: pa.Table, lines: NDArray[np.int64]) -> Table:
    is_text = {name: pa.types.is_string(arrow.schema.field(name).type) for name in arrow.column_names}
    return Table(
        path,
        {name: arrow[name].to_numpy() for name, text in is_text.items() if not text},
        {name: TextColumn.encode(arrow[name]) for name, text in is_text.items() if text},
        lines,
    )


def _numbered(path: Path, arrow: pa.Table, before: int) -> Table:
    return _table(path, arrow, np.arange(before + 1, before + arrow.num_rows + 1, dtype=np.int64))


def _parquet_blocks(path: Path, types: dict[str, pa.DataType]) -> Iterator[Table]:
    before = 0
    try:
        with pa_parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(types)):
                yield _numbered(path, _cast(str(path), pa.Table.from_batches([batch]), types), before)
                before += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _arrow_of(source: Frame, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        return pa.Table.from_pandas(source.data[list(types)], preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{source.name}: a column must hold values of one kind, but {error}") from None


def _cast(name: str, table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = table.select(list(types)).cast(pa.schema(types))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{name}: a column must hold the type that its name requires: {error}") from None
    for position, (name, kind) in enumerate(types.items()):
        if kind == pa.string():
            table = table.set_column(position, name, table[name].fill_null(""))
    return table
