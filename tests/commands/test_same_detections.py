"""One model on the same images: the training's own evaluation, evaluate, predict and the served model agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retinaflow.commands import evaluate, predict
from retinaflow.commands.train import TrainResult
from retinaflow.data.predictions import predictions_frame
from retinaflow.data.training_data import load_training_data
from retinaflow.inference.checkpoint import load_checkpoint, save_checkpoint
from retinaflow.inference.detector import Detector
from retinaflow.interrupts import StopRequest
from retinaflow.runs.served_model import DetectorModel
from retinaflow.settings.commands import EvaluateConfig, PredictConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.session import start_session

BOX = ["XMin", "YMin", "XMax", "YMax"]


@pytest.fixture
def checkpoint(trained: TrainResult, tmp_path: Path) -> Path:
    """A checkpoint whose training had settings of its own: detections must follow them everywhere."""
    loaded = load_checkpoint(trained.checkpoint)
    settings = {**loaded.settings, "score_threshold": 0.012, "nms_iou": 0.4, "max_detections": 150, "parents": "expand"}
    path = tmp_path / "best.pt"
    save_checkpoint(replace(loaded, settings=settings, parents="expand"), path)
    return path


def _evaluated(path: Path, output: Path, batch_size: int) -> pd.DataFrame:
    given = {"from_run": str(path), "output": str(output), "track": "false", "bootstrap": "0"}
    evaluate.run(resolve(EvaluateConfig, {**given, "batch_size": str(batch_size)}))
    return _exact(pd.read_csv(output / "predictions.csv", dtype=dict.fromkeys([*BOX, "Score"], np.float32)))


def _predicted(path: Path, output: Path, batch_size: int) -> pd.DataFrame:
    given = {"from_run": str(path), "output": str(output), "track": "false", "file_format": "parquet"}
    return _exact(pd.read_parquet(predict.run(resolve(PredictConfig, {**given, "batch_size": str(batch_size)}))))


def _exact(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["ImageID", "LabelName", "Score", *BOX]].astype(dict.fromkeys(("Score", *BOX), np.float32))


def _of_training(path: Path) -> pd.DataFrame:
    loaded = load_checkpoint(path)
    config = resolve(TrainConfig, {**loaded.settings, "config": None})
    session = start_session(config, load_training_data(config), loaded)
    with StopRequest() as stop:
        detections = session.evaluate_best(path, stop).detections
    return _exact(predictions_frame(detections, session.data.evaluated))


def _served(path: Path) -> pd.DataFrame:
    """Boxes are in pixels, one request for all images."""
    loaded = load_checkpoint(path)
    index = load_training_data(resolve(TrainConfig, {**loaded.settings, "config": None})).evaluated
    model = DetectorModel()
    model.load_context(SimpleNamespace(artifacts={"checkpoint": str(path)}, model_config={"images": "paths"}))
    files = [str(index.file_of(image)) for image in range(len(index))]
    rows = model.predict(None, pd.DataFrame({"image": files}))
    sizes = np.asarray(index.sizes)[rows["image"]]
    boxes = rows[["x1", "y1", "x2", "y2"]].to_numpy() / sizes[:, [1, 0, 1, 0]]
    return _exact(
        pd.DataFrame(
            {
                "ImageID": index.image_ids[rows["image"]],
                "LabelName": rows["label"],
                "Score": rows["score"],
                **dict(zip(BOX, boxes.T, strict=True)),
            }
        )
    )


@pytest.mark.slow
def test_training_evaluate_predict_and_the_served_model_find_the_same(checkpoint: Path, tmp_path: Path) -> None:
    many = _evaluated(checkpoint, tmp_path / "many", 16)
    assert many["Score"].min() > 0.012
    assert len(many) > 100
    assert many.groupby("ImageID").size().max() <= 150
    # Equal batches: equal to the last bit.
    pd.testing.assert_frame_equal(_of_training(checkpoint), many, check_exact=True)
    pd.testing.assert_frame_equal(_predicted(checkpoint, tmp_path / "predicted", 16), many, check_exact=True)
    # The server takes one image at a time, so it equals batches of one; pixels are divided and multiplied once more.
    one = _evaluated(checkpoint, tmp_path / "one", 1)
    pd.testing.assert_frame_equal(_predicted(checkpoint, tmp_path / "predicted one", 1), one, check_exact=True)
    served = _served(checkpoint)
    pd.testing.assert_frame_equal(served.drop(columns=BOX), one.drop(columns=BOX), check_exact=True)
    np.testing.assert_allclose(served[BOX], one[BOX], rtol=0, atol=1e-7)
    # Batches of another size: equal to the rounding of float32.
    assert len(one) == len(many)
    np.testing.assert_allclose(one["Score"], many["Score"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loader_processes_go_by_the_machine_unless_given(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from retinaflow.detector.device import MAX_WORKERS, loader_workers

    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert loader_workers(-1, torch.device(device)) == {"cpu": 0, "cuda": MAX_WORKERS}[device]
    assert loader_workers(3, torch.device(device)) == 3


def test_evaluate_takes_its_loader_processes_by_the_machine(
    trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took none on a GPU machine, against its help."""
    from retinaflow.inference import detector

    loaded: list[Any] = []
    load = Detector.load
    monkeypatch.setattr(detector, "loader_workers", lambda workers, device: 2 if workers < 0 else workers)
    monkeypatch.setattr(Detector, "load", staticmethod(lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]))
    _evaluated(trained.checkpoint, tmp_path, 16)
    assert [one.workers for one in loaded] == [2]
