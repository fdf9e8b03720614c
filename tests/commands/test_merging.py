"""``split`` and ``merge`` in a real store: parts trained, joined, evaluated, linked; what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from workshop import SMALL as SMALLEST

from retinaflow.cli import main
from retinaflow.commands import evaluate, merge, split
from retinaflow.commands.train import TrainResult
from retinaflow.comparison.stored_matches import read_matches
from retinaflow.ensemble.group_training import folder_of_group, read_groups
from retinaflow.inference.merged_checkpoint import MergedCheckpoint
from retinaflow.metric.challenge import average_precision
from retinaflow.runs.models import TrainedModel
from retinaflow.settings.commands import EvaluateConfig, MergeConfig, SplitConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.earlier_training import training_key

pytestmark = pytest.mark.slow

GROUPS = "Car,Bus,Vehicle+Tree,Plant"
SMALL = {**SMALLEST, "epochs": 1, "score_threshold": 0.005, "bootstrap": 100}


def _children(parent: Run) -> dict[str, Run]:
    found = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        output_format="list",
    )
    return {run.info.run_name: run for run in found}


def _last(command: str) -> Run:
    found = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`retinaflow.command` = '{command}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    return found[0]


def _split(workshop: Any, **given: Any) -> Run:
    settings = {"data": str(workshop.data), **SMALL, "groups": GROUPS, "output": "split", **given}
    split.run(resolve(SplitConfig, settings))
    return _last("split")


@pytest.fixture
def halves(workshop: Any, trained: TrainResult) -> Run:
    """A finished split of the tiny set in two groups, compared with the tracked training of all classes."""
    # With room for the detections of both models: a limit for all would cut the lowest of them.
    given = {"from_run": trained.run_id, "min_ground_truth": "1", "max_detections": "1000", "register_as": "halves"}
    made: Run = workshop.once("split", lambda: _split(workshop, **given))
    return made


def _parts(halves: Run) -> list[str]:
    return halves.data.tags["retinaflow.parts"].split(",")


def _merge(**given: Any) -> merge.MergeResult:
    return merge.run(resolve(MergeConfig, {"calibration": "none", "output": "merged", **given}))


def _ap(run_id: str) -> dict[str, float]:
    kept = read_matches(run_id)
    return dict(zip(kept.class_names, average_precision(kept.matches).tolist(), strict=True))


def test_split_trains_merges_and_compares_under_one_run(halves: Run, trained: TrainResult) -> None:
    children = _children(halves)
    names = [folder_of_group(group) for group in GROUPS.split("+")]
    assert set(children) == {*names, "merged", "calibrated"}
    assert {run.info.status for run in (*children.values(), halves)} == {"FINISHED"}
    inputs = MlflowClient().get_run(halves.info.run_id).inputs.dataset_inputs
    assert [one.tags[0].value for one in inputs] == ["training", "validation"]
    assert _parts(halves) == [children[name].info.run_id for name in names]
    path = mlflow.artifacts.download_artifacts(run_id=halves.info.run_id, artifact_path="comparison.csv")
    table = pd.read_csv(path).set_index("group")
    assert list(table.columns) == [
        "classes", "one_model", "merged", "merged_difference", "merged_difference_low", "merged_difference_high",
        "calibrated", "calibrated_difference", "calibrated_difference_low", "calibrated_difference_high",
    ]  # fmt: skip
    assert table.at["mAP", "one_model"] == pytest.approx(trained.evaluation.metrics["val/mAP"])
    for name in ("merged", "calibrated"):
        assert table.at["mAP", name] == pytest.approx(children[name].data.metrics["val/mAP"])
        low, high = (table.at["mAP", f"{name}_difference_{end}"] for end in ("low", "high"))
        assert low <= table.at["mAP", f"{name}_difference"] <= high
    assert halves.data.metrics["val/mAP"] == pytest.approx(table.at["mAP", "calibrated"])


def test_disjoint_models_keep_the_ap_of_each_class(halves: Run) -> None:
    merged = _ap(_children(halves)["merged"].info.run_id)
    assert set(merged) == {"Car", "Bus", "Vehicle", "Tree", "Plant"}
    for part in _parts(halves):
        for name, ap in _ap(part).items():
            np.testing.assert_equal(merged[name], ap)


def test_the_merged_run_links_its_parts_and_keeps_all_that_judging_needs(halves: Run) -> None:
    merged = _children(halves)["calibrated"]
    assert merged.data.tags["retinaflow.parts"] == halves.data.tags["retinaflow.parts"]
    for part in _parts(halves):
        assert f"/runs/{part})" in merged.data.tags["mlflow.note.content"]
    names = {item.path for item in MlflowClient().list_artifacts(merged.info.run_id)}
    assert names >= {
        "predictions.parquet", "calibration.csv", "calibrators.json", "calibration.png", "matches.npz",
        "per_class_ap.csv", "metrics.json", "ap_vs_frequency.png", "detections.png", "error_analysis.csv",
    }  # fmt: skip
    table = pd.read_csv(Path("split/calibrated/calibration.csv"))
    assert set(table["class"]) == {"Car", "Bus", "Vehicle", "Tree", "Plant"}
    document = json.loads(Path("split/calibrated/calibrators.json").read_text())
    assert [row["run_id"] for row in document["parts"]] == _parts(halves)


def test_the_calibrated_merge_of_a_split_is_registered_and_its_parts_are_not(halves: Run) -> None:
    client, children = MlflowClient(), _children(halves)
    [version] = client.search_model_versions("name = 'halves'")
    assert version.run_id == children["calibrated"].info.run_id
    model = TrainedModel.find("models:/halves/1").checkpoint
    assert isinstance(model, MergedCheckpoint)
    assert [member.run for member in model.members] == _parts(halves)
    assert model.taxonomy.names == ("Car", "Vehicle", "Tree", "Plant", "Bus")
    # The other way of merging is there to be compared with.
    assert "checkpoints" not in {item.path for item in client.list_artifacts(children["merged"].info.run_id)}


def test_the_same_split_again_trains_nothing_again(
    halves: Run, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one model for all, the two ways of merging are compared."""
    again = _split(workshop, min_ground_truth="1", max_detections="1000", output="again")
    assert again.info.run_id != halves.info.run_id
    assert set(_children(again)) == {"merged", "calibrated"}
    assert _parts(again) == _parts(halves)
    assert (
        capsys.readouterr().out.count(" has these settings and data and is finished; reuse=false trains it again") == 2
    )
    path = mlflow.artifacts.download_artifacts(run_id=again.info.run_id, artifact_path="comparison.csv")
    assert [name for name in pd.read_csv(path) if "difference" not in name] == [
        "group", "classes", "merged", "calibrated",
    ]  # fmt: skip


def test_a_split_that_was_stopped_goes_on_within_its_training(
    workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**SMALL, "data": workshop.data, "groups": "Car,Bus+Tree", "output": "halted", "min_ground_truth": "1"}
    # Long enough to be met in the middle: an epoch is three steps, and after the first one there is a checkpoint.
    given |= {"epochs": 6, "eval_every": 6}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    found: list[Path] = []

    def stop_in_the_middle() -> None:
        deadline = time.monotonic() + 60
        while not found and time.monotonic() < deadline:
            found.extend(Path("halted").glob("*/checkpoints/last.pt"))
            time.sleep(0.02)
        if found:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_in_the_middle)
    watcher.start()
    assert main(["split", *words]) == 130
    watcher.join()
    (stopped,) = (path.parents[1].name for path in found)
    assert mlflow.get_run(stopped).info.status == "KILLED"
    assert main(["split", *words]) == 0
    assert f"run {stopped} has these settings and data, is not finished, and is resumed" in capsys.readouterr().out
    assert mlflow.get_run(stopped).info.status == "FINISHED"
    assert _parts(_last("split"))[0] == stopped


def test_a_training_is_the_same_by_settings_and_data_not_by_place() -> None:
    config = resolve(TrainConfig, {"class_group": "Car"})
    key = training_key(config, "digest")
    elsewhere = resolve(TrainConfig, {"class_group": "Car", "output": "there", "workers": "2", "experiment": "x"})
    assert training_key(elsewhere, "digest") == key
    others = [resolve(TrainConfig, {"class_group": "Car", **more}) for more in ({"seed": 1}, {"lr": 0.5})]
    keys = [key, training_key(config, "other"), *(training_key(other, "digest") for other in others)]
    assert len(set(keys)) == 4


def test_a_training_from_other_weights_of_the_same_name_is_another(tmp_path: Path) -> None:
    """As ``weights=outputs/train/checkpoints/best.pt``, which the next training replaces."""
    weights, keys = tmp_path / "best.pt", []
    for content in (b"first", b"second", b"first"):
        weights.write_bytes(content)
        keys.append(training_key(resolve(TrainConfig, {"weights": str(weights)}), "digest"))
    assert keys[0] == keys[2] != keys[1]
    # A word is no path, whatever lies in the working folder.
    plain = training_key(resolve(TrainConfig, {"weights": "imagenet"}), "digest")
    with contextlib.chdir(tmp_path):
        Path("imagenet").write_bytes(b"third")
        assert training_key(resolve(TrainConfig, {"weights": "imagenet"}), "digest") == plain


def test_disjoint_models_may_come_in_any_order_and_are_evaluated_again_from_the_file(
    halves: Run, workshop: Any
) -> None:
    one, two = (_merge(runs=",".join(ids), track="false") for ids in (_parts(halves), _parts(halves)[::-1]))
    for column in ("image_index", "class_index", "score", "boxes"):
        np.testing.assert_array_equal(getattr(one.detections, column), getattr(two.detections, column))
    given = {"predictions": "merged/predictions.parquet", "data": str(workshop.data), "bootstrap": 0, "track": False}
    evaluated = evaluate.run(resolve(EvaluateConfig, given))
    assert evaluated.scores.mean_ap == one.evaluation.scores.mean_ap
    # What was merged can be merged again, from its file: here with nothing.
    same = _merge(runs="merged", output="again", track="false")
    assert same.evaluation.scores.mean_ap == one.evaluation.scores.mean_ap


def test_shared_classes_are_fused_and_parents_are_expanded_to(
    halves: Run, trained: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"{_parts(halves)[1]},{trained.run_id}"
    most = _merge(runs=runs, max_detections="3", track="false").detections
    assert "2 models, 5 classes, 2 of them shared; calibration: 7 none" in capsys.readouterr().out
    assert np.bincount(most.image_index).max() == 3
    # Every tree is a plant.
    found = _merge(runs=_parts(halves)[1], expand_predictions="true", track="false").detections
    trees, plants = (set(found.image_index[found.class_index == k].tolist()) for k in (0, 1))
    assert trees
    assert trees <= plants


def test_calibrators_of_other_images_are_used_as_they_are(
    halves: Run, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [f"validation{n:03d}" for n in range(6)]
    Path("first.txt").write_text("\n".join(images[:3]))
    Path("second.txt").write_text("\n".join(images[3:]))
    part = _parts(halves)[1]
    for name in ("first", "second"):
        given = {"from_run": part, "data": workshop.data, "eval_ids": f"{name}.txt", "output": name, "bootstrap": 0}
        assert workshop.cli("evaluate", **given, track="false") == 0
    _merge(runs="first", calibration="platt", min_ground_truth="1", output="fitted", track="false")
    capsys.readouterr()
    later = _merge(runs="second", calibration="auto", calibrators="fitted", output="applied", track="false")
    assert (
        json.loads(Path("applied/calibrators.json").read_text())["parts"][0]["classes"]
        == (json.loads(Path("fitted/calibrators.json").read_text())["parts"][0]["classes"])
    )
    np.testing.assert_array_equal(later.evaluation.scores.ap, average_precision(read_matches("second").matches))
    assert workshop.cli("merge", runs="second", calibrators="fitted", folds=3, output="again", track="false") == 2
    assert "folds has no effect beside calibrators=fitted, but got folds=3" in capsys.readouterr().err
    refused = {"runs": "first", "calibrators": "fitted", "track": "false"}
    assert workshop.cli("merge", **refused) == 2
    assert "must have been fitted on other images than those evaluated, but 3 are the same" in capsys.readouterr().err
    for damaged, message in (
        ("{", "not a readable JSON file"),
        ('{"parts": [3]}', "must be the calibrators.json of a merge"),
        ('{"parts": [{"classes": []}]}', "must be the calibrators.json of a merge"),
    ):
        Path("fitted/calibrators.json").write_text(damaged)
        assert workshop.cli("merge", runs="second", calibrators="fitted", output="again", track="false") == 2
        assert message in capsys.readouterr().err
    # Parts that were evaluated on different images are no whole.
    assert workshop.cli("merge", runs="first,second", track="false") == 2
    assert "only runs evaluated on the same images can be merged" in capsys.readouterr().err


REFUSED = {
    "twice": ({"runs": "{part},{part}"}, "each run can be merged once, but got twice"),
    "unknown": ({"runs": "nowhere"}, "run nowhere: there is no such id or name"),
    "bad fold": ({"runs": "{part}", "folds": "1"}, "folds >= 2 must hold, but got folds=1"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_merge_refuses_with_a_reason(
    fault: str, halves: Run, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = REFUSED[fault]
    filled = {name: value.format(part=_parts(halves)[0]) for name, value in given.items()}
    assert workshop.cli("merge", **filled, track="false") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": "people-clothing"}, "groups must be two different class groups or more, joined by +"),
        ({"groups": "Car+Car"}, "groups must be two different class groups or more"),
        (
            {"keep_best": "val/mAP,val/AP/Car:2"},
            "keep_best must be a metric that every class group has, but got val/AP/Car",
        ),
        ({"target": "val/mAP_bin_1:0.5"}, "target must be a metric that every class group has, but got val/mAP_bin_1"),
        ({"class_group": "Car"}, "split makes the class groups from groups, but got class_group=Car"),
        ({"with_all": "true", "from_run": "abc"}, "with_all or from_run can be given, not both"),
        ({"calibration": "none"}, "calibration=none leaves nothing to compare"),
    ],
)
def test_split_refuses_before_it_trains(
    workshop: Any, given: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.cli("split", data=workshop.data, **given, track="false") == 2
    assert message in capsys.readouterr().err


def test_split_refuses_a_model_evaluated_on_other_images_before_it_trains(
    trained: TrainResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("some.txt").write_text("train001\ntrain002\n")
    given = {"groups": GROUPS, "from_run": trained.run_id, "eval_ids": "some.txt", "output": "refused"}
    assert workshop.cli("split", data=workshop.data, **given, track="false") == 2
    assert "must have been evaluated on the images that the split is evaluated on" in capsys.readouterr().err
    assert not list(Path("refused").glob("*/checkpoints"))


def test_every_group_has_a_name_of_its_own() -> None:
    assert folder_of_group("people-clothing") == "people-clothing"
    long = [folder_of_group(f"{'Salt and pepper shakers,' * 9}{end}") for end in ("Car", "Bus")]
    assert long[0] != long[1]
    names = (*long, folder_of_group("/m/0car,/m/0bus"), folder_of_group("Car,Bus"))
    assert all(len(name) < 50 and "/" not in name for name in names)
    # They can be given to merge one by one, by name or as a folder.
    assert resolve(MergeConfig, {"runs": ",".join(f"outputs/{name}" for name in names)}).runs == tuple(
        f"outputs/{name}" for name in names
    )


def test_groups_are_joined_by_plus_and_bins_may_be_a_range() -> None:
    assert read_groups("people-clothing+rest") == ["people-clothing", "rest"]
    assert read_groups("Car,Bus + bin:2..4") == ["Car,Bus", "bin:2", "bin:3", "bin:4"]
