"""``visualize``: which images are drawn, and what beside what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from retinaflow.commands import visualize
from retinaflow.commands.train import TrainResult
from retinaflow.reports.box_images import class_color
from retinaflow.settings.commands import VisualizeConfig
from retinaflow.settings.resolve import resolve


def _draw(output: Path, **given: Any) -> list[Path]:
    values = {"output": output, "track": "false", **given}
    return visualize.run(resolve(VisualizeConfig, {name: str(value) for name, value in values.items()}))


def _has_color(path: Path, class_id: str, half: int) -> bool:
    """Whether the left (0) or right (1) half shows a class's colour, up to what JPEG changes."""
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    middle = pixels.shape[1] // 2
    part = pixels[:, middle:] if half else pixels[:, :middle]
    return bool((np.abs(part.astype(int) - class_color(class_id)).max(axis=2) < 12).sum() > 50)


def test_a_models_detections_stand_beside_the_truth_of_a_seeded_sample(trained: TrainResult, tmp_path: Path) -> None:
    given = {"from_run": trained.checkpoint.absolute(), "samples": 2, "min_score": 0.02}
    first, again = (_draw(tmp_path / name, **given, seed=1) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in again]
    assert len(first) == 2
    assert first[0].read_bytes() == again[0].read_bytes()
    named = _draw(tmp_path / "c", **given, ids="validation003,validation001")
    assert [path.stem for path in named] == ["validation001", "validation003"]
    # 96 x 64 pixels are drawn at 512 x 341, twice beside each other; the ground truth has a car and a tree.
    assert cv2.imread(str(named[0])).shape[1] == 2 * 341 + 8
    assert _has_color(named[0], "/m/0car", 0)
    assert _has_color(named[0], "/m/0tree", 0)


def test_a_file_of_predictions_is_drawn_without_a_model_and_a_parent_is_not_drawn_over_its_child(
    workshop: Any, tmp_path: Path
) -> None:
    predictions = tmp_path / "found.csv"
    found = ("/m/0car,0.9", "/m/0vehicle,0.95", "/m/0tree,0.1")
    rows = "".join(f"validation000,{one},0.1,0.6,0.1,0.6\n" for one in found)
    predictions.write_text(f"ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n{rows}")
    (path,) = _draw(tmp_path, predictions=predictions, data=workshop.data, ids="validation000")
    assert _has_color(path, "/m/0car", 1)
    assert not _has_color(path, "/m/0vehicle", 1)
    # Below min_score.
    assert not _has_color(path, "/m/0tree", 1)
    alone = _draw(
        tmp_path / "alone", predictions=predictions, data=workshop.data, ids="validation000", ground_truth="false"
    )
    assert cv2.imread(str(alone[0])).shape[1] == 512


def test_an_image_that_turns_out_damaged_stops_or_is_skipped(
    workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        pixels = cv2.imread(str(workshop.data / "images" / f"validation00{number}.jpg"))
        assert cv2.imwrite(str(images / f"{number}.png"), pixels)
    whole = (images / "0.png").read_bytes()
    # Head and end are sound, most of the pixels are not there.
    head = len(whole) // 8
    (images / "0.png").write_bytes(whole[:head] + bytes(len(whole) - head - 12) + whole[-12:])
    predictions = tmp_path / "found.csv"
    predictions.write_text("ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n1,/m/0car,0.9,0.1,0.6,0.1,0.6\n")
    given = {"predictions": predictions, "data": workshop.data, "images": images}
    with pytest.raises(ValueError, match=r"0\.png: not a readable image"):
        _draw(tmp_path, **given)
    assert [path.name for path in _draw(tmp_path, **given, on_bad_image="skip")] == ["1.jpg"]
    assert "1 images became unreadable and were skipped" in capsys.readouterr().out


def test_an_id_that_is_not_there_is_refused(trained: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids must be among the 6 images, but elsewhere is not"):
        _draw(tmp_path, from_run=trained.checkpoint.absolute(), ids="elsewhere")
