"""A run in a folder, whose files may be damaged when it is resumed, and are not replaced by another command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from retinaflow.errors import DataError, SettingError
from retinaflow.runs.run import FolderRun, refuse_folder_of_another
from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.resolve import resolve


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


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _training(folder: Path) -> Path:
    """A folder as a training without MLflow leaves it, as far as other commands would write there."""
    run = FolderRun(folder)
    run.set_tags({"retinaflow.status": "FINISHED"})
    run.log_metrics({"val/mAP": 0.5}, step=1)
    run.log_json({"lr": 1}, "config.json")
    (folder / "matches.npz").write_bytes(b"matches")
    return folder


COMMANDS_IN_OUTPUT: dict[str, dict[str, Any]] = {
    "evaluate": {},
    "evaluate a file": {"predictions": "none.csv"},
    "compare": {"runs": "one,two"},
    "merge": {"runs": "one,two"},
    "predict": {},
    "visualize": {"predictions": "none.csv"},
    "explore": {},
    "binning": {},
    "main": {},
    "split": {},
    "search": {"study": "train"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS_IN_OUTPUT)
def test_no_other_command_replaces_the_files_of_a_training(
    case: str, workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder = case.split()[0], _training(tmp_path / "train")
    before = _files(tmp_path)
    given = {"output": tmp_path if command == "search" else folder, "track": "false", **COMMANDS_IN_OUTPUT[case]}
    if "data" in COMMANDS[command].model_fields:
        given["data"] = workshop.data
    (tmp_path / "none.csv").write_text("ImageID,PredictionString\n", encoding="utf-8")
    assert workshop.cli(command, **given) == 2
    assert f"output={folder}: the folder holds a training" in capsys.readouterr().err
    (tmp_path / "none.csv").unlink()
    after = {name: content for name, content in _files(tmp_path).items() if not name.startswith("study.db")}
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    ("command", "given", "refused"),
    [
        ("merge", {"runs": "one,out"}, "those of the runs that are read"),
        ("compare", {"runs": "one,two+out"}, "those of the runs that are read"),
        ("merge", {"runs": "one,two", "calibrators": "out"}, "those of the runs that are read"),
        ("evaluate", {"from_run": "out/../out"}, "those of the runs that are read"),
        ("predict", {"from_run": "out/checkpoints/best.pt"}, "those of the runs that are read"),
        ("predict", {"from_run": "out/best.pt"}, None),
        ("merge", {"runs": "one,two"}, None),
    ],
)
def test_no_command_replaces_the_files_that_it_reads(
    command: str, given: dict[str, str], refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As an earlier merge has left it, which may be done again.
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/best.pt").write_bytes(b"")
    Path("out/tags.json").write_text(json.dumps({"retinaflow.parts": "one,two"}), encoding="utf-8")
    config = resolve(COMMANDS[command], {**given, "output": "out"})
    with contextlib.nullcontext() if refused is None else pytest.raises(SettingError, match=refused):
        refuse_folder_of_another(config)


def test_a_training_that_logs_to_mlflow_has_its_checkpoints_only(tmp_path: Path) -> None:
    config = resolve(COMMANDS["evaluate"], {"output": str(tmp_path)})
    refuse_folder_of_another(config)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"")
    with pytest.raises(SettingError, match="the folder holds a training"):
        refuse_folder_of_another(config)
