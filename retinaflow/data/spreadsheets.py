"""Text that a spreadsheet shows instead of running: class names and image ids are those of other people's files.

A cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return is a formula to a spreadsheet, which can
fetch an address or start a program. Such a text is written with an apostrophe before it (OWASP, "CSV injection");
:func:`from_spreadsheet` takes it off, so what is read is what was written. Numbers stay as they are. Parquet files and
files in the layout of a data set or a Kaggle submission, which programs read, have no apostrophes.
"""

from __future__ import annotations

import re

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]inf")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_WRITTEN = r"^'('*[=+\-@\t\r])"


def for_spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before every text, names of columns included, that is a formula or looks like one
    that was written so."""
    names = [_shown(name) for name in table.columns]
    texts = [at for at, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    if names == list(table.columns) and not any(_has_formula(table.iloc[:, at]) for at in texts):
        return table
    columns = [table.iloc[:, at].map(_shown) if at in texts else table.iloc[:, at] for at in range(len(names))]
    return pd.concat(columns, axis=1).set_axis(names, axis=1)


def from_spreadsheet(values: pa.StringArray) -> pa.StringArray:
    """The texts as they were before :func:`for_spreadsheet`."""
    return pa_compute.replace_substring_regex(values, _WRITTEN, r"\1")


def _has_formula(column: pd.Series[str]) -> bool:
    return any(isinstance(value, str) and _shown(value) != value for value in column.unique())


def _shown(value: object) -> object:
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"
