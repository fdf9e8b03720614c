"""The exposure table of a training with copy-paste, from the published files to ``exposure.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_index import TinyDataset

from retinaflow.data.training_data import load_training_data
from retinaflow.reports.bins_and_exposure import log_exposure
from retinaflow.runs.run import FolderRun
from retinaflow.settings.commands import BinningConfig, TrainConfig
from retinaflow.settings.resolve import resolve

PASTED = {"pasted_expected", "pasted_planned", "covered_planned"}


def exposure_of(folder: Path, kind: Any, **given: Any) -> pd.DataFrame:
    config = resolve(kind, {"data": str(folder), "num_bins": 2, **given})
    data = load_training_data(config)
    log_exposure(FolderRun(folder / "run"), config, data)
    return pd.read_csv(folder / "run" / "exposure.csv")


def test_the_table_of_a_training_shows_what_is_pasted_and_counts_ancestors_as_the_bins_do(
    tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_dataset(train=24)
    given = {"copy_paste": 0.5, "epoch_length": 400, "image_size": 64, "num_buckets": 2, "balance": 0.75}
    table = exposure_of(folder, TrainConfig, **given).set_index("class_id")
    # Half of 400 images, each with a crop of Bus, the only class of the rarest bin.
    assert table.loc["/m/0bus", "pasted_expected"] >= 199.9
    assert table.loc["/m/0bus", "pasted_planned"] == pytest.approx(200, abs=50)
    assert table.loc["/m/0vehicle", "pasted_expected"] >= table.loc["/m/0bus", "pasted_expected"]
    assert (table["covered_planned"] >= 0).all()
    assert "copy_paste=0.5: crops of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "given"),
    [(BinningConfig, {}), (TrainConfig, {}), (TrainConfig, {"copy_paste": 0.5, "num_bins": 1})],
    ids=["binning", "no copy-paste", "no class is rarer"],
)
def test_without_pasted_crops_the_table_is_as_it_was(
    tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str], kind: Any, given: dict[str, Any]
) -> None:
    assert not PASTED & set(exposure_of(tiny_dataset(), kind, **given).columns)
    assert ("copy_paste has no effect" in capsys.readouterr().out) == bool(given)
