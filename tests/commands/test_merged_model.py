"""The model that ``merge`` leaves, in a real store: it detects as the merge did, every command takes it, and it is
registered and served like any model."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.commands import compare, evaluate, merge, predict, promote, train, visualize
from retinaflow.commands.train import TrainResult
from retinaflow.comparison.stored_matches import read_matches
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.inference.detector import Detector
from retinaflow.inference.merged_checkpoint import MergedCheckpoint, load_model
from retinaflow.inference.merged_detections import merge_detections
from retinaflow.runs.evaluated_detections import images_for_model
from retinaflow.runs.models import TrainedModel
from retinaflow.settings.commands import (
    CompareConfig,
    EvaluateConfig,
    MergeConfig,
    PredictConfig,
    PromoteConfig,
    VisualizeConfig,
)
from retinaflow.settings.model_settings import JoinSettings
from retinaflow.settings.resolve import resolve
from retinaflow.statistics.calibration import apply_calibrators

pytestmark = pytest.mark.slow

COLUMNS = ["ImageID", "LabelName", "Score", "XMin", "YMin", "XMax", "YMax"]
NAME = "models:/pair/1"


def _merge(**given: Any) -> merge.MergeResult:
    return merge.run(resolve(MergeConfig, {"calibration": "none", "output": "merged_pair", **given}))


def _evaluate(output: str, **given: Any) -> Any:
    return evaluate.run(resolve(EvaluateConfig, {"output": output, "bootstrap": "0", "samples": "0", **given}))


@pytest.fixture
def plants(workshop: Any) -> TrainResult:
    """A training of two of the five classes."""
    settings = workshop.settings(class_group="Tree,Plant", epochs=1, seed=5, output="plants")
    made: TrainResult = workshop.once("plants", lambda: train.run(settings))
    return made


@pytest.fixture
def pair(plants: TrainResult, trained: TrainResult, workshop: Any) -> merge.MergeResult:
    """A merge without calibration of two models that share two classes, registered."""
    given = {"runs": f"{plants.run_id},{trained.run_id}", "expand_predictions": "true", "max_detections": "80"}
    made: merge.MergeResult = workshop.once("pair", lambda: _merge(**given, register_as="pair"))
    return made


def _rows(path: Path) -> pd.DataFrame:
    """Rows of a file of predictions, to the last bit."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)[COLUMNS].astype(dict.fromkeys(COLUMNS[:2], "str"))
    frame = pd.read_csv(path, dtype=str)[COLUMNS]
    return frame.assign(**{name: frame[name].map(float) for name in COLUMNS[2:]})


def test_an_evaluation_of_the_model_has_the_detections_of_the_merge(pair: merge.MergeResult) -> None:
    evaluated = _evaluate("again", from_run=pair.run_id)
    pd.testing.assert_frame_equal(
        _rows(Path("again/predictions.csv")), _rows(Path("merged_pair/predictions.parquet")), check_exact=True
    )
    np.testing.assert_array_equal(evaluated.scores.ap, pair.evaluation.scores.ap)
    assert evaluated.metrics == pair.evaluation.metrics
    assert np.bincount(pair.detections.image_index).max() == 80


def test_members_that_were_evaluated_detect_by_the_settings_of_their_evaluation(
    plants: TrainResult, trained: TrainResult
) -> None:
    members = {"one": plants.run_id, "two": trained.run_id}
    for output, run_id in members.items():
        given = {"nms": "soft-nms", "score_threshold": "0.012"} if output == "one" else {}
        _evaluate(output, from_run=run_id, track="false", **given)
    made = _merge(runs="one,two", output="evaluated_pair", track="false")
    checkpoint = Path("evaluated_pair/checkpoints/best.pt")
    found = _evaluate("evaluated_again", from_run=str(checkpoint), track="false")
    pd.testing.assert_frame_equal(
        _rows(Path("evaluated_again/predictions.csv")),
        _rows(Path("evaluated_pair/predictions.parquet")),
        check_exact=True,
    )
    assert found.metrics == made.evaluation.metrics
    model = load_model(checkpoint)
    assert isinstance(model, MergedCheckpoint)
    assert [one.checkpoint.settings["nms"] for one in model.members] == ["soft-nms", "nms"]
    assert [one.run for one in model.members] == ["one", "two"]


def test_a_calibrated_model_has_the_calibrators_of_the_file(plants: TrainResult, trained: TrainResult) -> None:
    runs = f"{plants.run_id},{trained.run_id}"
    _merge(runs=runs, calibration="platt", min_ground_truth="1", output="calibrated", track="false")
    model = load_model(Path("calibrated/checkpoints/best.pt"))
    assert isinstance(model, MergedCheckpoint)
    stored = json.loads(Path("calibrated/calibrators.json").read_text())["parts"]
    for one, row in zip(model.members, stored, strict=True):
        ids = one.checkpoint.taxonomy.ids
        assert {mid: own.to_document() for mid, own in zip(ids, one.calibrators, strict=True)} == row["classes"]
    assert "platt" in {own.method for one in model.members for own in one.calibrators}
    # They are applied: by hand from the detections of the two models.
    images = images_for_model(resolve(EvaluateConfig, {}), model.taxonomy, model.settings).index
    parts = []
    for one, result in zip(model.members, (plants, trained), strict=True):
        found = Detector.load(load_checkpoint(result.checkpoint)).detect(
            images.with_classes(np.array([images.taxonomy.index_of[mid] for mid in one.checkpoint.taxonomy.ids]))
        )
        parts.append(apply_calibrators(found, one.calibrators))
    expected = merge_detections(parts, model.classes, model.taxonomy, JoinSettings())
    given = Detector.load(model).detect(images)
    np.testing.assert_array_equal(given.score, expected.score)
    np.testing.assert_array_equal(given.class_index, expected.class_index)
    np.testing.assert_array_equal(given.boxes, expected.boxes)


# As any model


def test_the_registered_model_has_what_any_has(pair: merge.MergeResult, plants: TrainResult) -> None:
    client = MlflowClient()
    [version] = client.search_model_versions("name = 'pair'")
    assert version.run_id == pair.run_id
    run = client.get_run(pair.run_id)
    [output] = run.outputs.model_outputs
    model = mlflow.get_logged_model(output.model_id)
    assert output.step == 0
    assert model.tags["retinaflow.model_digest"] == TrainedModel.find(NAME).checkpoint.digest[:16]
    metrics = {metric.key: (metric.value, metric.step, metric.dataset_name) for metric in model.metrics}
    assert metrics["val/mAP"] == (run.data.metrics["val/mAP"], 0, "tiny/validation")
    info, plain = (mlflow.models.get_model_info(f"models:/{name}/1") for name in ("pair", "tiny-detector"))
    assert info.signature == plain.signature
    folders = [Path(mlflow.artifacts.download_artifacts(f"models:/{name}/1")) for name in ("pair", "tiny-detector")]
    ours, theirs = ((folder / "requirements.txt").read_text() for folder in folders)
    assert ours == theirs
    assert "torch==" in ours
    # One file holds all.
    assert [path.name for path in folders[0].rglob("*.pt")] == ["best.pt"]
    found = mlflow.search_logged_models(
        [run.info.experiment_id], filter_string="metrics.`val/mAP` >= 0", output_format="list"
    )
    assert model.model_id in [one.model_id for one in found]
    assert TrainedModel.find(pair.run_id).model_id == TrainedModel.find(NAME).model_id == model.model_id
    assert plants.run_id in run.data.tags["retinaflow.parts"]


def test_the_served_model_gives_the_boxes_of_predict(pair: merge.MergeResult, workshop: Any) -> None:
    del pair
    given = {"from_run": NAME, "output": "merged_predicted", "file_format": "parquet", "batch_size": "1"}
    rows = _rows(predict.run(resolve(PredictConfig, given)))
    file = workshop.data / "images" / "validation001.jpg"
    image = base64.b64encode(file.read_bytes()).decode()
    found = mlflow.pyfunc.load_model(NAME).predict(pd.DataFrame({"image": [image]}))
    own = rows[rows["ImageID"] == "validation001"]
    assert found["label"].tolist() == own["LabelName"].tolist()
    # 96 x 64 pixels.
    size = np.array([64, 96, 64, 96, 1])
    expected = own[["XMin", "YMin", "XMax", "YMax", "Score"]].to_numpy() * size
    np.testing.assert_allclose(found[["x1", "y1", "x2", "y2", "score"]], expected, rtol=0, atol=1e-4)


def test_predict_takes_it_in_shards_and_several_processes_and_resumes(
    pair: merge.MergeResult, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"from_run": "merged_pair/checkpoints/best.pt", "output": "shards", "file_format": "json", "track": "false"}
    config = resolve(PredictConfig, {**given, "shard_size": "2", "nproc": "2"})
    path = predict.run(config)
    found = json.loads(path.read_text())
    assert len(found) == len(pair.detections)
    np.testing.assert_allclose(sorted(one["score"] for one in found), np.sort(pair.detections.score), rtol=0, atol=1e-6)
    capsys.readouterr()
    predict.run(config)
    assert "6 of 6 images are done already" in capsys.readouterr().out


def test_visualize_compare_and_promote_take_it(
    pair: merge.MergeResult, trained: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    promote.run(
        resolve(PromoteConfig, {"runs": f"{pair.run_id},{trained.run_id}", "register_as": "best", "bootstrap": "100"})
    )
    promote.run(resolve(PromoteConfig, {"runs": pair.run_id, "register_as": "pair", "bootstrap": "100"}))
    assert "models:/pair@champion is now version 1" in capsys.readouterr().out
    assert TrainedModel.find("models:/pair@champion").run_id == pair.run_id
    pages = visualize.run(resolve(VisualizeConfig, {"from_run": "models:/pair@champion", "samples": "2"}))
    assert len(pages) == 2
    _evaluate("for_compare", from_run="models:/pair@champion", track="false")
    given = {"runs": f"for_compare,{pair.run_id}", "bootstrap": "100", "track": "false"}
    comparison = compare.run(resolve(CompareConfig, given))
    assert comparison.group("mAP")["B_difference"] == 0
    assert read_matches("for_compare").class_ids == read_matches(pair.run_id).class_ids


# What is refused, and merges without a model


REFUSED = {
    "a graph": ("export", {}, "an ONNX graph holds one network, and this model is merged from several; export its"),
    "another size": ("predict", {"image_size": "96"}, "so image_size must not be given, but got image_size=96"),
    "other suppression": ("evaluate", {"nms": "soft-nms"}, "so nms must not be given, but got nms=soft-nms"),
    "resume": (
        "train",
        {"resume": "merged_pair/checkpoints/best.pt"},
        "one network is needed, but this is a merged model",
    ),
    "weights": (
        "train",
        {"weights": "merged_pair/checkpoints/best.pt"},
        "must hold the weights of one network, but it is a",
    ),
    "its own folder": (
        "merge",
        {"runs": "merged_pair", "output": "merged_pair"},
        "output must be another folder than those of the",
    ),
    "a merge in a merge": ("merge", {"runs": "{pair}"}, "is a merge itself; name the runs that it has merged instead"),
    "an evaluation of one": ("merge", {"runs": "of_pair"}, "is merged itself; name runs of its members instead: runs="),
    "a file": (
        "merge",
        {"runs": "of_file"},
        "/merged_pair/predictions.parquet, whose model is not here",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_take_it_names_what_to_do(
    fault: str, pair: merge.MergeResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command, given, message = REFUSED[fault]
    if given.get("runs") == "of_pair":
        _evaluate("of_pair", from_run=pair.run_id, track="false")
    if given.get("runs") == "of_file":
        _evaluate("of_file", predictions="merged_pair/predictions.parquet", data=str(workshop.data), track="false")
    filled = {name: value.format(pair=pair.run_id) for name, value in given.items()}
    if command == "merge":
        # Before the work: nothing is written.
        filled = {"register_as": "never", "output": "never", **filled}
    elif command == "train":
        filled |= {"data": workshop.data, "image_size": 64, "epochs": 1, "output": "never"}
    else:
        filled |= {"from_run": pair.run_id, "output": "never"}
    capsys.readouterr()
    assert workshop.cli(command, **filled) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("never").rglob("best.pt"))


def test_a_member_whose_model_is_gone_leaves_a_merge_without_one(
    plants: TrainResult, trained: TrainResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained.checkpoint, "moved.pt")
    for output, name in (("whole", plants.run_id), ("gone", "moved.pt")):
        _evaluate(output, from_run=name, track="false")
    _merge(runs="whole", output="partial", track="false")
    assert load_model(Path("partial/checkpoints/best.pt")).taxonomy.names == ("Tree", "Plant")
    # Another model under the same name is not the one that was evaluated.
    shutil.copy(plants.checkpoint, "moved.pt")
    capsys.readouterr()
    _merge(runs="whole,gone", output="partial", track="false")
    said = capsys.readouterr().out
    assert said.count("the merge leaves no model: moved.pt holds another model than the one that run gone has ev") == 1
    # That of the earlier merge in this folder is gone too.
    assert not Path("partial/checkpoints/best.pt").exists()
    Path("moved.pt").unlink()
    assert workshop.cli("merge", runs="whole,gone", output="partial", register_as="pair", track="false") == 2
    assert "register_as=pair needs a model of each run, but moved.pt: no such" in capsys.readouterr().err


def _edit(path: Path, **values: Any) -> None:
    document = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


NO_MODEL = {
    "an earlier version": ("tags.json", {"retinaflow.model_digest": None}, "has not noted which model it evaluated"),
    "parents by evaluate": ("config.json", {"expand_predictions": True}, "of parent classes that its model does not"),
    "another size": ("config.json", {"image_size": 96}, "was evaluated at image_size=96, at which its model was not"),
}


@pytest.mark.parametrize("reason", NO_MODEL)
def test_an_evaluation_that_its_model_does_not_repeat_is_no_member(
    reason: str, plants: TrainResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.once("repeated", lambda: _evaluate("repeated", from_run=plants.run_id, track="false"))
    file, values, message = NO_MODEL[reason]
    shutil.copytree("repeated", "not_repeated", dirs_exist_ok=True)
    _edit(Path("not_repeated") / file, **values)
    capsys.readouterr()
    assert workshop.cli("merge", runs="not_repeated", register_as="never", track="false") == 2
    assert message in capsys.readouterr().err


def test_members_that_were_evaluated_on_images_of_their_own_need_data_to_be_given(
    trained: TrainResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _evaluate("elsewhere", from_run=trained.run_id, data=str(workshop.data), track="false")
    made = _merge(runs="elsewhere", output="of_elsewhere", track="false")
    checkpoint = "of_elsewhere/checkpoints/best.pt"
    given = {"from_run": checkpoint, "track": "false"}
    for command in ("evaluate", "predict"):
        assert workshop.cli(command, output="never", **given) == 2
        assert "data must be given for this merged model" in capsys.readouterr().err
    assert _evaluate("of_elsewhere_again", data=str(workshop.data), **given).metrics == made.evaluation.metrics
