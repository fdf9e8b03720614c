"""A run in a folder, whose files may be damaged when it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinaflow.errors import DataError
from retinaflow.runs.run import FolderRun


def _logged(folder: Path) -> Path:
    run = FolderRun(folder)
    for step in (1, 2):
        run.log_metrics({"val/mAP": 0.5 * step}, step=step)
    return folder / "metrics.jsonl"


def test_a_resumed_run_logs_each_step_once_after_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    metrics = _logged(tmp_path)
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "val')
    FolderRun(tmp_path, resumed=True).log_metrics({"val/mAP": 1.0}, step=2)
    assert metrics.read_text() == whole


@pytest.mark.parametrize("line", ["{", "[1]", '{"val/mAP": 1}', '{"step": null}', "\0"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    metrics = _logged(tmp_path)
    metrics.write_text(f"{line}\n{metrics.read_text()}")
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        FolderRun(tmp_path, resumed=True)


@pytest.mark.parametrize("text", ["[1]", '"finished"', "{"])
def test_a_damaged_file_of_tags_is_named_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "tags.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"tags\.json"):
        FolderRun(tmp_path).set_tags({"device": "cpu"})
    assert (tmp_path / "tags.json").read_text(encoding="utf-8") == text
