"""``evaluate --predictions``: the published metric cases through the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scoring_scenes import CASE_NAMES, CASES

from retinaflow.cli import main
from retinaflow.comparison.chosen_runs import chosen_run
from retinaflow.comparison.images_of_run import images_of_run_with_all_classes
from retinaflow.ensemble.member_detections import detections_of
from retinaflow.metric.challenge import average_precision


def _evaluate(case: Path, output: Path, **more: Any) -> int:
    given = {
        "predictions": case / "predictions.csv",
        "boxes": case / "boxes.csv",
        "image_labels": case / "labels.csv",
        "classes": case / "classes.csv",
        "hierarchy": case / "hierarchy.json" if (case / "hierarchy.json").is_file() else "none",
        "output": output,
        "track": "false",
        "bootstrap": 0,
        **more,
    }
    return main(["evaluate", *(word for name, value in given.items() for word in (f"--{name}", str(value)))])


@pytest.mark.skipif(not CASES.is_dir(), reason="the metric cases are not here")
@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("name", CASE_NAMES)
def test_a_published_case_scores_as_published(name: str, weight: int, tmp_path: Path) -> None:
    assert _evaluate(CASES / name, tmp_path, group_of_weight=weight) == 0
    expected = json.loads((CASES / name / f"expected_weight_{weight}.json").read_text(encoding="utf-8"))
    table = pd.read_csv(tmp_path / "per_class_ap.csv").set_index("class_id")
    assert set(table.index) == set(expected["per_class"])
    for mid, values in expected["per_class"].items():
        ap = np.nan if values["AP_forward"] is None else values["AP_forward"]
        np.testing.assert_allclose(table.loc[mid, "ap"], ap, rtol=0, atol=1e-9, equal_nan=True)
        np.testing.assert_allclose(table.loc[mid, "num_truths"], values["num_gt"], rtol=0, atol=1e-9)
    document = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(document["mAP"], expected["mAP_forward"], rtol=0, atol=1e-9)
    assert document["num_classes_in_mean"] == expected["num_classes_in_mean"]
    if weight == 0:
        assert any("group_of_weight is 0" in reason for reason in document["not_a_challenge_score"])


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Two images, two classes: one right and one wrong detection of /m/0a, nothing of /m/0b."""
    folder = tmp_path / "case"
    folder.mkdir()
    corners = "XMin,XMax,YMin,YMax"
    (folder / "classes.csv").write_text("/m/0a,A\n/m/0b,B\n")
    (folder / "boxes.csv").write_text(
        f"ImageID,LabelName,{corners}\nx,/m/0a,0.1,0.5,0.1,0.5\ny,/m/0a,0.2,0.6,0.2,0.6\ny,/m/0b,0.7,0.9,0.7,0.9\n"
    )
    (folder / "labels.csv").write_text("ImageID,LabelName,Confidence\nx,/m/0a,1\ny,/m/0a,1\ny,/m/0b,1\n")
    (folder / "predictions.csv").write_text(
        f"ImageID,LabelName,Score,{corners}\nx,/m/0a,0.9,0.1,0.5,0.1,0.5\ny,/m/0a,0.8,0.7,0.8,0.1,0.2\n"
    )
    return folder


def test_a_hand_worked_case(case: Path, tmp_path: Path) -> None:
    """A: found 1 of 2, precision 1 up to recall 1/2: AP 1/2. B: 1 ground truth, nothing found: AP 0."""
    assert _evaluate(case, tmp_path / "out", bootstrap=20) == 0
    table = pd.read_csv(tmp_path / "out" / "per_class_ap.csv").set_index("class")
    assert table["ap"].to_dict() == {"A": 0.5, "B": 0.0}
    assert (table["ap_low"] <= table["ap"]).all()
    assert (table["ap"] <= table["ap_high"]).all()
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["mAP"] == 0.25
    low, high = document["intervals"]["mAP"]
    assert low <= 0.25 <= high


def test_predictions_as_parquet_score_as_the_csv(case: Path, tmp_path: Path) -> None:
    pd.read_csv(case / "predictions.csv").to_parquet(case / "predictions.parquet")
    for number, name in enumerate(("predictions.csv", "predictions.parquet")):
        assert _evaluate(case, tmp_path / str(number), predictions=case / name) == 0
    assert (tmp_path / "0" / "per_class_ap.csv").read_bytes() == (tmp_path / "1" / "per_class_ap.csv").read_bytes()


def test_an_evaluated_file_is_found_from_another_folder(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case)
    names = {name: f"{name}.csv" for name in ("predictions", "boxes", "classes")}
    with (case / "predictions.csv").open("a") as file:
        file.write("x,/m/0b,0.7,0.1,0.5,0.1,0.5\n")
    assert _evaluate(case, tmp_path / "out", **names, image_labels="labels.csv", class_group="A") == 0
    monkeypatch.chdir(tmp_path)
    chosen = chosen_run(str(tmp_path / "out"))
    images = images_of_run_with_all_classes(chosen.stored)
    images = images.with_classes(np.array([images.taxonomy.find("A")]))
    # Without its row of the other class it is complete.
    found, matches = detections_of(chosen, images, "there is no model")
    assert len(found) == 2
    assert average_precision(matches).tolist() == [0.5]


def test_eval_ids_keep_the_judgement_to_some_images(case: Path, tmp_path: Path) -> None:
    (case / "ids.txt").write_text("ImageID\nx\n")
    assert _evaluate(case, tmp_path / "out", eval_ids=case / "ids.txt") == 0
    table = pd.read_csv(tmp_path / "out" / "per_class_ap.csv").set_index("class")
    assert table.loc["A", "ap"] == 1.0
    assert np.isnan(table.loc["B", "ap"])


def test_a_class_group_has_the_scores_that_its_classes_have_beside_the_others(case: Path, tmp_path: Path) -> None:
    (case / "hierarchy.json").write_text(
        json.dumps(
            {"LabelName": "/m/0r", "Subcategory": [{"LabelName": "/m/0b", "Subcategory": [{"LabelName": "/m/0a"}]}]}
        )
    )
    for name, group in (("all", "all"), ("a", "A"), ("b", "/m/0b")):
        assert _evaluate(case, tmp_path / name, class_group=group, expand_predictions="true") == 0
    whole = pd.read_csv(tmp_path / "all" / "per_class_details.csv").set_index("class")
    # The box of A that is found is one of B's three too.
    assert whole["ap"].to_dict() == {"A": 0.5, "B": pytest.approx(1 / 3)}
    for name in ("a", "b"):
        table = pd.read_csv(tmp_path / name / "per_class_details.csv").set_index("class")
        pd.testing.assert_frame_equal(table, whole.loc[[name.upper()]])
        document = json.loads((tmp_path / name / "metrics.json").read_text())
        assert document["mAP"] == pytest.approx(whole.loc[name.upper(), "ap"])
        assert document["num_images"] == 2


def test_a_row_of_an_unknown_class_stops_or_is_dropped_and_listed(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (case / "predictions.csv").open("a") as file:
        file.write("x,/m/0z,0.5,0.1,0.2,0.1,0.2\n")
    assert _evaluate(case, tmp_path / "out") == 2
    assert "predictions.csv line 4: LabelName must be in the class list" in capsys.readouterr().err
    assert _evaluate(case, tmp_path / "out", on_bad_row="drop") == 0
    listed = pd.read_csv(tmp_path / "out" / "dropped.csv")
    assert listed[["file", "line"]].to_numpy().tolist() == [["predictions.csv", 4]]


REFUSED = {
    "no annotations": ({"boxes": "none"}, "predictions need annotations to be evaluated on"),
    "missing predictions": ({"predictions": "nowhere.csv"}, "nowhere.csv: no such file"),
    "missing boxes": ({"boxes": "nowhere.csv"}, "nowhere.csv: no such file"),
    "no listed image": ({"eval_ids": "ids.txt"}, "at least one listed image must be in the split"),
    "group without a class": ({"class_group": "C"}, "class_group=C: "),
    "bin of no training": ({"class_group": "bin:1"}, "bin:K must name a bin, 1 = rarest; the bins are none here"),
    "setting of a model": ({"score_threshold": 0.3}, "score_threshold has no effect beside predictions=/"),
    "image size of a model": ({"image_size": 640}, "image_size has no effect beside predictions=/"),
    "model beside a file": ({"from_run": "best.pt"}, "from_run has no effect beside predictions=/"),
    "ids of another format": ({"prediction_ids": "ids.json"}, "prediction_ids has no effect beside predictions=/"),
    "bad weight": ({"group_of_weight": -1}, "group_of_weight >= 0 must hold, but got group_of_weight=-1"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_evaluated_is_refused(
    fault: str, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(case)
    (case / "ids.txt").write_text("elsewhere\n")
    given, message = REFUSED[fault]
    assert _evaluate(case, tmp_path / "out", **given) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
