"""``predict`` writes COCO results, ``evaluate`` reads them and gives the numbers of pycocotools on converted files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from coco_reference import reference

from retinaflow.commands import convert, evaluate, predict
from retinaflow.commands.train import TrainResult
from retinaflow.errors import SettingError
from retinaflow.settings.commands import ConvertConfig, EvaluateConfig, PredictConfig
from retinaflow.settings.resolve import resolve


def predicted(trained: TrainResult, output: Path, **given: str) -> Path:
    values = {"from_run": str(trained.checkpoint.absolute()), "output": str(output), "track": "false", **given}
    return predict.run(resolve(PredictConfig, values))


def document(data: Path, predictions: Path, output: Path, **given: str) -> dict[str, Any]:
    values = {"data": str(data), "predictions": str(predictions), "output": str(output), "track": "false", **given}
    evaluate.run(resolve(EvaluateConfig, values | {"bootstrap": "0"}))
    return dict(json.loads((output / "metrics.json").read_text(encoding="utf-8")))


@pytest.mark.slow
def test_predicted_coco_results_have_the_numbers_of_pycocotools(
    trained: TrainResult, workshop: Any, tmp_path: Path
) -> None:
    convert.run(resolve(ConvertConfig, {"data": str(workshop.data), "to": "coco", "output": str(tmp_path / "coco")}))
    annotations = tmp_path / "coco" / "annotations" / "instances_val.json"
    path = predicted(trained, tmp_path / "json", file_format="json", prediction_ids=str(annotations))
    assert path.name == "predictions.json"
    ours = document(workshop.data, path, tmp_path / "of_json", prediction_ids=str(annotations))
    stats, _ = reference(json.loads(annotations.read_text()), json.loads(path.read_text()))
    for name, value in stats.items():
        assert ours["coco"].get(f"coco_{name}", -1.0) == pytest.approx(value, abs=1e-9), name
    assert ours["coco"]["coco_AP"] == ours["metrics"]["val/coco_AP"] > 0
    # The same detections as CSV give the same numbers. No image is opened for them, so that areas are not known.
    csv = predicted(trained, tmp_path / "csv")
    areas = ("_small", "_medium", "_large")
    ours["coco"] = {name: value for name, value in ours["coco"].items() if not name.endswith(areas)}
    assert document(workshop.data, csv, tmp_path / "of_csv") == ours
    details = pd.read_csv(tmp_path / "of_csv" / "per_class_details.csv")
    assert details["coco_ap"].mean() == pytest.approx(ours["coco"]["coco_AP"], abs=1e-12)


def test_ids_of_another_format_are_refused() -> None:
    with pytest.raises(SettingError, match=r"prediction_ids applies to file_format=json, but got file_format=csv"):
        resolve(PredictConfig, {"prediction_ids": "instances_val.json"})
