"""A folder holds one training: what is resumed continues where it is, and nothing of another training is replaced."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, cast

import mlflow
import pytest

from retinaflow.commands import train
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.runs import owner
from retinaflow.runs.owner import owner_of, owner_where_writable
from retinaflow.training.distributed import ALONE
from retinaflow.training.resume import Resumed
from retinaflow.training.run_folder import folder_name_of, refuse_second_training, training_run


def _resumed(folder: Path, run_id: str = "train") -> Resumed:
    """A training to resume in a folder, as far as its folder counts."""
    return Resumed(cast(Checkpoint, None), None, run_id, folder)


@pytest.mark.slow
@pytest.mark.trains
def test_a_renamed_training_is_resumed_where_it_is(workshop: Any, tmp_path: Path) -> None:
    given = {"track": False, "output": str(tmp_path)}
    for seed in (0, 1):
        assert train.run(workshop.settings(**given, epochs=1, seed=seed)) is not None
    newer = {path.name: path.read_bytes() for path in (tmp_path / "train" / "checkpoints").glob("*.pt")}
    found = train.run(workshop.settings(**given, epochs=2, resume=str(tmp_path / "train-1")))
    assert found is not None
    assert found.checkpoint.parent == tmp_path / "train-1" / "checkpoints"
    assert load_checkpoint(found.checkpoint.with_name("last.pt")).epoch == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "train" / "checkpoints").glob("*.pt")} == newer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "train-1"]


def test_a_training_that_is_resumed_from_elsewhere_replaces_none(workshop: Any, tmp_path: Path) -> None:
    config = workshop.settings(track=False, output=str(tmp_path / "outputs"))
    last = tmp_path / "outputs" / "train" / "checkpoints" / "last.pt"
    for folder in (last.parent, tmp_path / "kept"):
        folder.mkdir(parents=True)
        (folder / "last.pt").write_text(str(folder), encoding="utf-8")
    resumed = _resumed(tmp_path / "kept")
    name = folder_name_of(config, resumed, None)
    with training_run(config, resumed, ALONE, name=None, called="train", folder_name=name):
        assert not last.exists()
    aside = tmp_path / "outputs" / "train-1" / "checkpoints" / "last.pt"
    assert aside.read_text(encoding="utf-8") == str(last.parent)
    assert (tmp_path / "kept" / "last.pt").is_file()


def test_the_folder_of_a_training_is_that_of_its_checkpoint_in_output(workshop: Any, tmp_path: Path) -> None:
    config = workshop.settings(track=False, output=str(tmp_path / "outputs"))
    (tmp_path / "outputs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outputs")
    for place, expected in (
        ("outputs/train-3/checkpoints", "train-3"),
        ("outputs/../outputs/train-3/checkpoints", "train-3"),
        ("link/rest/checkpoints", "rest"),
        ("elsewhere/train-3/checkpoints", "train"),
        ("outputs/train-3", "train"),
    ):
        assert folder_name_of(config, _resumed(tmp_path / place), "uniform") == expected, place
    assert folder_name_of(config, None, "uniform") == "uniform"


def test_the_earlier_training_can_be_resumed_while_the_new_one_runs(workshop: Any, tmp_path: Path) -> None:
    config = workshop.settings(track=False, output=str(tmp_path))
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    (tmp_path / "train" / "checkpoints" / "last.pt").write_text("earlier", encoding="utf-8")
    with training_run(config, None, ALONE, name=None, called="train", folder_name="train"):
        earlier = tmp_path / "train-1" / "checkpoints"
        assert sorted(path.name for path in earlier.iterdir() if path.name != owner.LOCK) == ["last.pt"]
        refuse_second_training(config, _resumed(earlier), folder_name="train-1")
        with training_run(config, _resumed(earlier), ALONE, name=None, called="train", folder_name="train-1"):
            pass


@pytest.mark.parametrize("name", [None, "uniform", "people-clothing"])
def test_what_a_training_could_not_send_is_found_under_whatever_name_it_was_trained(
    name: str | None, workshop: Any, tmp_path: Path
) -> None:
    """By the id of its run, in ``output``: ``train`` resumes what ``main`` and ``split`` have begun."""
    run_id = str(mlflow.MlflowClient().create_run("0").info.run_id)
    point = {"kind": "metrics", "time": 1, "step": 1, "metrics": {"val/mAP": 0.5}}
    journal = tmp_path / f"unsent-{run_id}" / "unsent.jsonl"
    (tmp_path / "last").mkdir()
    journal.parent.mkdir()
    journal.write_text(json.dumps(point) + "\n", encoding="utf-8")
    config, resumed = workshop.settings(output=str(tmp_path)), _resumed(tmp_path / "last", run_id)
    with training_run(config, resumed, ALONE, name=name, called="train", folder_name=name or "train"):
        pass
    assert mlflow.get_run(run_id).data.metrics == {"val/mAP": 0.5}
    assert not journal.parent.exists()


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_training_whose_run_is_gone_is_resumed_in_a_new_one(
    how: str, workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = "0" * 32
    if how == "deleted":
        gone = str(mlflow.MlflowClient().create_run("0").info.run_id)
        mlflow.delete_run(gone)
    (tmp_path / "last").mkdir()
    config, resumed = workshop.settings(output=str(tmp_path)), _resumed(tmp_path / "last", gone)
    with training_run(config, resumed, ALONE, name=None, called="train", folder_name="train") as run:
        assert run.run_id != gone
    assert f"the checkpoint's run {gone} is not in" in capsys.readouterr().out
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_training_is_resumed_from_a_folder_that_cannot_be_written(
    number: int, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    _make_read_only(tmp_path / "mounted", number, monkeypatch)
    config, resumed = workshop.settings(track=False, output=str(tmp_path / "outputs")), _resumed(tmp_path / "mounted")
    refuse_second_training(config, resumed, folder_name="train")
    with training_run(config, resumed, ALONE, name=None, called="train", folder_name="train") as run:
        assert run.run_id == "train"
        assert (tmp_path / "outputs" / "train" / "checkpoints" / owner.OWNER).is_file()
    assert list((tmp_path / "mounted").iterdir()) == []


def test_a_disk_that_fails_is_no_read_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_read_only(tmp_path, errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="error"), owner_where_writable(tmp_path):
        pass
    with pytest.raises(OSError, match="error"), owner_of(tmp_path):
        pass


def _make_read_only(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files in a folder be opened for writing with that error only, as on a mount; tests run as root too."""
    plain = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if path.parent == folder and mode != "r":
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, mode, *args, **more)

    monkeypatch.setattr(Path, "open", opened)
