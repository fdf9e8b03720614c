"""``predict``: the numbers of ``evaluate``, whatever images are named and however often it is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest

from retinaflow.commands import predict
from retinaflow.commands.train import TrainResult
from retinaflow.data.images import file_states
from retinaflow.data.predictions import read_predictions
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import load_training_data
from retinaflow.errors import DataError, Interrupted, SettingError, WorkerError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.inference.image_selection import wanted_images
from retinaflow.inference.prediction_folder import PredictionFolder
from retinaflow.inference.shard_processes import Work, predict_shards
from retinaflow.interrupts import StopRequest
from retinaflow.settings.commands import PredictConfig
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ["Score", "XMin", "YMin", "XMax", "YMax"]


def _config(trained: TrainResult, output: Path, **more: Any) -> PredictConfig:
    given = {"from_run": trained.checkpoint.absolute(), "output": str(output), "track": "false", **more}
    return resolve(PredictConfig, {name: str(value) for name, value in given.items()})


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def _assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Rows of an image stand in the order of their scores in both. Scores that differ by rounding may change places."""
    assert len(ours) > 0
    for name in NUMBERS:
        first, second = (table.sort_values(["ImageID", "LabelName", name]) for table in (ours, theirs))
        for key in ("ImageID", "LabelName"):
            assert first[key].tolist() == second[key].tolist()
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-6)
    for table in (ours, theirs):
        assert (table.groupby("ImageID")["Score"].diff().dropna() <= 1e-6).all()


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_the_images_evaluated_in_training_get_the_detections_of_evaluate(
    trained: TrainResult, evaluated: Path, tmp_path: Path, file_format: str
) -> None:
    path = predict.run(_config(trained, tmp_path, file_format=file_format, shard_size=4))
    assert path == tmp_path / f"predictions.{file_format}"
    _assert_same(_read(path), pd.read_csv(evaluated / "predictions.csv"))
    assert [shard.name for shard in sorted((tmp_path / "shards").iterdir())] == ["00000.parquet", "00001.parquet"]


@pytest.mark.parametrize("kind", ["folder", "paths", "ids", "kaggle list"])
def test_images_may_be_a_folder_or_a_list(
    trained: TrainResult, evaluated: Path, workshop: Any, tmp_path: Path, kind: str
) -> None:
    ids = ["validation001", "validation003"]
    folder, listed = tmp_path / "mine" / "below", tmp_path / "list.txt"
    folder.mkdir(parents=True)
    for image_id in ids:
        (folder / f"{image_id}.jpg").write_bytes((workshop.data / "images" / f"{image_id}.jpg").read_bytes())
    given: dict[str, Any] = {"image_list": listed}
    if kind == "folder":
        given = {"images": tmp_path / "mine"}
    elif kind == "paths":
        listed.write_text("".join(f"mine/below/{image_id}.jpg\n" for image_id in ids))
    elif kind == "ids":
        listed.write_text("\n".join(ids))
    else:
        listed.write_text("ImageId,PredictionString\n" + "".join(f"{image_id},\n" for image_id in ids))
    path = predict.run(_config(trained, tmp_path / "out", **given))
    expected = pd.read_csv(evaluated / "predictions.csv")
    _assert_same(pd.read_csv(path), expected[expected["ImageID"].isin(ids)])


def test_a_split_without_annotations_is_the_folder_of_its_name(
    trained: TrainResult, workshop: Any, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    (data / "test" / "x.jpg").write_bytes((workshop.data / "images" / "validation001.jpg").read_bytes())
    path = predict.run(_config(trained, tmp_path / "out", data=data, split="test"))
    assert set(pd.read_csv(path)["ImageID"]) == {"x"}
    with pytest.raises(DataError, match=r"holds no folder images or train"):
        predict.run(_config(trained, tmp_path / "out", data=data, split="train"))


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.zeros((32, 48, 3), dtype=np.uint8))


REFUSED = {
    "two files of one id": (
        {"images": "same"},
        ValueError,
        "an image id .* must stand for one file, but a is .*a.png and",
    ),
    "no such folder": ({"images": "nowhere"}, SettingError, "images=nowhere: no such folder"),
    "an empty folder": ({"images": "empty"}, ValueError, "at least one image is needed, but there is none in empty"),
    "no such list": ({"image_list": "none.txt"}, SettingError, "image_list=none.txt: no such file"),
    "a list of other things": (
        {"image_list": "odd.txt"},
        ValueError,
        "odd.txt line 2: an image id must be a plain file",
    ),
    "a listed file that is not there": ({"image_list": "gone.txt"}, ValueError, "gone.jpg: .*No such file"),
    "an id without a file": (
        {"image_list": "id.txt", "images": "good"},
        DataError,
        "b has none, for example",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_images_that_are_not_there_are_refused_with_their_name(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("same/a.png", "same/below/a.jpg", "good/a.png"):
        _picture(Path(name))
    Path("empty").mkdir()
    for name, lines in (("odd", "good/a.png\n../x\n"), ("gone", "gone.jpg\n"), ("id", "a\nb\n")):
        Path(f"{name}.txt").write_text(lines)
    given, kind, message = REFUSED[fault]
    with pytest.raises(kind, match=message):
        wanted_images(resolve(PredictConfig, given), Taxonomy(("/m/0a",), ("A",)), {})


def test_a_listed_path_is_relative_to_its_list_and_an_id_is_looked_up(tmp_path: Path) -> None:
    for name in ("good/a.png", "other/b.jpg"):
        _picture(tmp_path / name)
    (tmp_path / "list.txt").write_text("a\n\nother/b.jpg\na\n")
    config = resolve(PredictConfig, {"image_list": str(tmp_path / "list.txt"), "images": str(tmp_path / "good")})
    index = wanted_images(config, Taxonomy(("/m/0a",), ("A",)), {}).index
    assert index.image_ids.tolist() == ["a", "b"]
    assert [index.file_of(n) for n in (0, 1)] == [tmp_path / "good/a.png", tmp_path / "other/b.jpg"]
    assert index.sizes.tolist() == [[32, 48], [32, 48]]


def test_an_id_is_looked_up_in_the_subfolders_too(tmp_path: Path) -> None:
    for name in ("images/top.png", "images/x/deep.png", "images/y/other.png", "images/z/other.png"):
        _picture(tmp_path / name)
    (tmp_path / "list.txt").write_text("deep\ntop\n")
    config = resolve(PredictConfig, {"image_list": str(tmp_path / "list.txt"), "images": str(tmp_path / "images")})
    index = wanted_images(config, Taxonomy(("/m/0a",), ("A",)), {}).index
    assert [index.file_of(n).relative_to(tmp_path).as_posix() for n in (0, 1)] == [
        "images/x/deep.png",
        "images/top.png",
    ]
    (tmp_path / "list.txt").write_text("other\n")
    with pytest.raises(ValueError, match=r"other is .*y/other\.png and .*z/other\.png; rename one, or"):
        wanted_images(config, Taxonomy(("/m/0a",), ("A",)), {})


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_a_file_name_that_is_not_utf_8_is_shown_byte_by_byte(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.png").rename(os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.png"))
    config = resolve(PredictConfig, {"images": str(tmp_path / "images")})
    with pytest.raises(ValueError, match=r"caf\\xe9\.png.*: a file name must be UTF-8; rename the file or its folder"):
        wanted_images(config, Taxonomy(("/m/0a",), ("A",)), {})


KILLED = """
import os, signal, sys
from retinaflow.cli import main
from retinaflow.inference import prediction_folder

write, written = prediction_folder.pa_parquet.write_table, []

def write_or_die(table, path):
    written.append(path)
    if len(written) == 3:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(table, path)

prediction_folder.pa_parquet.write_table = write_or_die
main(["predict", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_and_no_finished_shard_is_done_twice(
    trained: TrainResult, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(trained, tmp_path, shard_size=1)
    flags = {"from_run": config.from_run, "output": tmp_path, "track": "false", "shard_size": 1}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    shards = tmp_path / "shards"
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert sorted(done) == ["00000.parquet", "00001.parquet"]
    assert len(list(shards.iterdir())) == 3

    # Several processes go on; a shard is done by one of them.
    path = predict.run(config.model_copy(update={"nproc": 2}))
    assert "2 of 6 images are done already" in capsys.readouterr().out
    assert {name: (shards / name).stat().st_mtime_ns for name in done} == done
    assert len(list(shards.iterdir())) == 6
    _assert_same(pd.read_csv(path), pd.read_csv(evaluated / "predictions.csv"))

    # A shard that was damaged on the disk is no shard.
    (shards / "00003.parquet").write_bytes(b"damaged")
    predict.run(config)
    assert "5 of 6 images are done already" in capsys.readouterr().out
    _assert_same(pd.read_csv(path), pd.read_csv(evaluated / "predictions.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(("end", "error"), [("killed", WorkerError), ("stopped", Interrupted)])
def test_processes_end_together_when_one_is_killed_or_all_are_asked_to(
    trained: TrainResult, tmp_path: Path, end: str, error: type[Exception]
) -> None:
    config = _config(trained, tmp_path)
    loaded = load_checkpoint(trained.checkpoint)
    index = wanted_images(config, loaded.taxonomy, loaded.settings).index
    others = set(multiprocessing.active_children())
    request = PredictionFolder.opened(tmp_path, {"model": "a"}, file_states(index), shard_size=1)
    with request as folder, StopRequest() as stop:
        work = Work(trained.checkpoint, config, index)
        finished = predict_shards(work, folder.shards, nproc=2, stop=stop, after_batch=lambda images: None)
        assert next(finished).shard.notes() is not None
        if end == "killed":
            os.kill(next(iter(set(multiprocessing.active_children()) - others)).pid or 0, signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(error):
            list(finished)
        assert set(multiprocessing.active_children()) <= others


def test_shards_of_changed_files_are_done_again_and_others_are_not(
    trained: TrainResult, workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes((workshop.data / "images" / f"validation00{number}.jpg").read_bytes())
    config = _config(trained, tmp_path / "out", images=images, shard_size=2)
    before = pd.read_csv(predict.run(config))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    # Another picture of the same name and size.
    (images / "3.jpg").write_bytes((images / "3.jpg").read_bytes())
    assert cv2.imwrite(str(images / "3.jpg"), np.full((*cv2.imread(str(images / "3.jpg")).shape[:2], 3), 90, np.uint8))
    capsys.readouterr()
    after = pd.read_csv(predict.run(config))
    said = capsys.readouterr().out
    assert "2 of 4 images are done already" in said
    assert "1 of 2 shards are done again: damaged, or image files have changed since" in said
    kept, changed = before["ImageID"] < 3, after["ImageID"] == 3
    assert after[~changed & (after["ImageID"] < 3)].equals(before[kept])
    assert not after[changed].reset_index(drop=True).equals(before[before["ImageID"] == 3].reset_index(drop=True))

    # overwrite=true begins anew also where nothing differs.
    predict.run(config.model_copy(update={"overwrite": True}))
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert all(now[name] > time for name, time in done.items())


@pytest.mark.parametrize(("images", "nproc", "size"), [(6, 2, 1), (100, 2, 13), (100_000, 2, 1000), (6, 1, 1000)])
def test_every_process_has_shards_to_do_and_who_goes_on_keeps_their_size(
    images: int, nproc: int, size: int, tmp_path: Path
) -> None:
    states = np.zeros((images, 2), dtype=np.int64)
    for given in ({"nproc": nproc}, {"nproc": 3}, {"shard_size": size}):
        with PredictionFolder.opened(tmp_path, {"model": "a"}, states, **given) as folder:
            assert folder.shard_size == size
            assert sum(shard.last - shard.first for shard in folder.shards) == images


def test_another_request_in_the_same_folder_is_refused_with_what_differs(trained: TrainResult, tmp_path: Path) -> None:
    predict.run(_config(trained, tmp_path))
    before = (tmp_path / "predictions.csv").read_bytes()
    other = _config(trained, tmp_path, score_threshold=0.9)
    with pytest.raises(ValueError, match=r"another request: score_threshold 0\.02 there, 0\.9 now\. Give"):
        predict.run(other)
    (tmp_path / "list.txt").write_text("validation001")
    with pytest.raises(ValueError, match="number of images 6 there, 1 now"):
        predict.run(_config(trained, tmp_path, image_list=tmp_path / "list.txt"))
    assert (tmp_path / "predictions.csv").read_bytes() == before
    path = predict.run(other.model_copy(update={"overwrite": True}))
    assert (pd.read_csv(path)["Score"] > 0.9).all()


def test_a_submission_has_every_image_and_reads_back_as_the_predictions(
    trained: TrainResult, workshop: Any, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        source = workshop.data / "images" / f"validation00{number}.jpg"
        (images / f"v{number}.jpg").write_bytes(source.read_bytes())
    assert cv2.imwrite(str(images / "empty.png"), np.zeros((64, 64, 3), dtype=np.uint8))
    (images / "broken.jpg").write_bytes(b"no image")
    submission = tmp_path / "submission.csv"
    given = {"images": images, "submission": submission}
    with pytest.raises(ValueError, match=r"1 of 5 image files cannot be read; .*broken\.jpg: not an image file"):
        predict.run(_config(trained, tmp_path / "out", **given))
    path = predict.run(_config(trained, tmp_path / "out", **given, on_bad_image="skip", shard_size=2))
    rows = pd.read_csv(submission, keep_default_na=False)
    assert list(rows.columns) == ["ImageId", "PredictionString"]
    assert rows["ImageId"].tolist() == ["empty", "v0", "v1", "v2", "broken"]
    assert rows["PredictionString"].tolist()[-1] == ""
    listed = pd.read_csv(tmp_path / "out" / "dropped.csv")
    assert listed[["file", "rule"]].to_numpy().tolist() == [["broken", "an image must have a readable file"]]

    ours = pd.read_csv(path)
    words = " ".join(rows["PredictionString"]).split()
    assert len(words) == 6 * len(ours) > 0
    assert words[0::6] == ours["LabelName"].tolist()
    for place, name in enumerate(NUMBERS, start=1):
        np.testing.assert_allclose(np.array(words[place::6], dtype=float), ours[name], rtol=1e-6)
    # evaluate's reader takes both, empty strings too.
    index = load_training_data(workshop.settings()).evaluated
    both = [read_predictions(file, index, RowErrors("stop")) for file in (submission, path)]
    assert [len(found) for found in both] == [len(ours)] * 2


def test_parents_expand_gives_every_ancestor_of_a_detection_its_best_score(
    trained: TrainResult, tmp_path: Path
) -> None:
    table = pd.read_csv(predict.run(_config(trained, tmp_path, parents="expand", max_detections=1000)))
    best = table.groupby(["ImageID", "LabelName"])["Score"].max().unstack()
    best = best.reindex(columns=["/m/0car", "/m/0bus", "/m/0tree", "/m/0vehicle", "/m/0plant"]).fillna(0.0)
    assert (best[["/m/0car", "/m/0bus", "/m/0tree"]] > 0).any(axis=None)
    assert (best["/m/0vehicle"] >= best[["/m/0car", "/m/0bus"]].max(axis=1)).all()
    assert (best["/m/0plant"] >= best["/m/0tree"]).all()


def test_a_run_is_logged_with_its_model_counts_and_file(trained: TrainResult, workshop: Any) -> None:
    output = workshop.folder / "predicted"
    config = resolve(PredictConfig, {"from_run": "models:/tiny-detector/1", "output": str(output)})
    table = pd.read_csv(predict.run(config))
    (run,) = mlflow.search_runs(
        filter_string=f"tags.`retinaflow.command` = 'predict' and params.output = '{output}'",
        experiment_names=["retinaflow"],
        output_format="list",
    )
    assert run.info.status == "FINISHED"
    assert run.data.tags["retinaflow.model_run"] == trained.run_id
    assert run.data.metrics["predict/detections"] == len(table)
    assert run.data.metrics["predict/images"] == 6
    assert run.data.metrics["predict/images_per_second"] > 0
    names = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"predictions.csv", "manifest.json", "config.json"} <= names
    assert json.loads((output / "manifest.json").read_text())["settings"]["score_threshold"] == 0.02
