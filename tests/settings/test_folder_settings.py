"""Settings that come with a data folder from elsewhere: no path leads out of it, and no text expands."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinaflow.errors import DataError
from retinaflow.settings.commands import BinningConfig
from retinaflow.settings.resolve import resolve


@pytest.mark.parametrize(
    "text",
    [
        "eval_split: ../secret/validation",
        "eval_split: /etc/secret",
        "eval_split: C:\\secret",
        "eval_split: validation,../x",
        "train_splits: [train, ../x]",
        "train_splits: ..",
        "train_splits: {a: b}",
        "train_splits: [[a]]",
        "eval_split:",
    ],
)
def test_a_data_folder_names_splits_of_its_own(text: str, tmp_path: Path) -> None:
    (tmp_path / "retinaflow.yaml").write_text(text)
    with pytest.raises(DataError, match=r"retinaflow\.yaml: a split must be a plain name, but got (eval|train)_split"):
        resolve(BinningConfig, {"data": str(tmp_path)})


def test_a_split_of_a_data_folder_may_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "retinaflow.yaml").write_text("train_splits: [1, 2]\neval_split: 3\n")
    found = resolve(BinningConfig, {"data": str(tmp_path)})
    assert (found.train_splits, found.eval_split) == (("1", "2"), "3")


def test_nested_anchors_of_a_data_folder_are_cut_in_the_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    (tmp_path / "retinaflow.yaml").write_text("train_splits: [train]\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="a data folder may give") as caught:
        resolve(BinningConfig, {"data": str(tmp_path)})
    assert len(str(caught.value)) < 1000
    (tmp_path / "retinaflow.yaml").write_text("\n".join(lines[:-1]).replace("a0: ", "train_splits: ", 1))
    with pytest.raises(DataError) as caught:
        resolve(BinningConfig, {"data": str(tmp_path)})
    assert len(str(caught.value)) < 1000
