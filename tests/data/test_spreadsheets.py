"""A cell that a spreadsheet would run is shown as text, and read back as it was."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_index import make_index

from retinaflow.data.predictions import predictions_frame, read_predictions
from retinaflow.data.spreadsheets import for_spreadsheet, from_spreadsheet
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.runs.run import FolderRun
from retinaflow.taxonomy import Taxonomy

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", '=HYPERLINK("http://a")', "-image", "'=1")


def as_read(table: pd.DataFrame) -> pd.DataFrame:
    """The texts of a CSV file of the table."""
    return pd.read_csv(io.StringIO(for_spreadsheet(table).to_csv(index=False)), dtype=str, na_filter=False)


def test_formulas_get_an_apostrophe_and_other_texts_and_numbers_do_not() -> None:
    others = ("Tree", "a=b", "1-2", "", "-1", "+0.5", "-1e-5", "'quoted'", "/m/0abc", "-inf")
    table = pd.DataFrame({"class": [*FORMULAS, *others], "ap": -np.arange(len(FORMULAS) + len(others)) / 2})
    found = as_read(table)
    assert found["class"].tolist() == [*(f"'{text}" for text in FORMULAS), *others]
    assert found["ap"].astype(float).tolist() == table["ap"].tolist()
    assert table["class"][0] == "=1+1", "the table itself is unchanged"


def test_a_column_of_several_kinds_and_its_name_are_written_so_too() -> None:
    table = pd.DataFrame({"=name": ["=x", 3, None, -2.5, True], "n": [1, 2, 3, 4, 5]})
    found = as_read(table)
    assert list(found.columns) == ["'=name", "n"]
    assert found["'=name"].tolist() == ["'=x", "3", "", "-2.5", "True"]


def test_an_ordinary_table_is_not_copied_and_an_empty_one_is_fine() -> None:
    table = pd.DataFrame({"class": ["Tree", "Car"], "ap": [0.1, 0.2]})
    assert for_spreadsheet(table) is table
    assert list(for_spreadsheet(table.iloc[:0]).columns) == ["class", "ap"]


@given(st.lists(st.text(alphabet="'=+-@\ta1 .e", max_size=6)))
def test_what_is_read_is_what_was_written(texts: list[str]) -> None:
    written = for_spreadsheet(pd.DataFrame({"a": pd.Series(texts, dtype=object)}))["a"].tolist()
    assert from_spreadsheet(pa.array(written, pa.string())).to_pylist() == texts


def test_every_table_of_a_run_is_written_so(tmp_path: Path) -> None:
    FolderRun(tmp_path).log_csv(pd.DataFrame({"class": ["=1+1"], "ap": [0.5]}), "per_class_ap.csv")
    assert (tmp_path / "per_class_ap.csv").read_text() == "class,ap\n'=1+1,0.5\n"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_of_such_images_and_classes_are_read_back(tmp_path: Path, suffix: str) -> None:
    names = ("-image", "=1+1", "'=1")
    index = make_index([[], [], []], classes=3)
    index = type(index)(**{**vars(index), "image_ids": np.array(names), "taxonomy": Taxonomy(names, names)})
    order = np.arange(3, dtype=np.int32)
    found = Detections(order, order, np.full(3, 0.5, np.float32), np.tile(np.float32([0, 0, 1, 1]), (3, 1)))
    table, path = predictions_frame(found, index), tmp_path / f"predictions.{suffix}"
    if suffix == "csv":
        FolderRun(tmp_path).log_csv(table, path.name)
        assert not [line for line in path.read_text().splitlines() if line[0] in "=+-@"]
    else:
        table.to_parquet(path)
    again = read_predictions(path, index, RowErrors("stop"))
    assert again.image_index.tolist() == again.class_index.tolist() == [0, 1, 2]
