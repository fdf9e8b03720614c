"""``evaluate`` evaluates a model as its training did, unless told otherwise, and from any folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retinaflow.commands import evaluate, train
from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.images_of_run import images_of_run
from retinaflow.comparison.stored_matches import read_matches
from retinaflow.data.training_data import load_training_data
from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import load_checkpoint, save_checkpoint
from retinaflow.inference.detector import as_trained
from retinaflow.runs.evaluated_detections import images_for_model
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.resolve import resolve, with_absolute_paths


def _changed(checkpoint: Path, place: Path, **settings: Any) -> Path:
    """A copy of a checkpoint whose training had other settings."""
    loaded = load_checkpoint(checkpoint)
    loaded.settings.update(settings)
    save_checkpoint(loaded, place)
    return place


def test_settings_of_detections_and_precision_come_from_the_training_unless_given(
    trained: train.TrainResult, tmp_path: Path
) -> None:
    path = _changed(trained.checkpoint, tmp_path / "best.pt", score_threshold=0.3, nms="soft-nms", max_detections=7)
    checkpoint = load_checkpoint(path)
    used = as_trained(resolve(EvaluateConfig, {}), checkpoint)
    assert (used.score_threshold, used.nms, used.max_detections, used.precision) == (0.3, "soft-nms", 7, "float32")
    # What was given is kept, even when it is the default.
    given = {"score_threshold": "0.02", "precision": "auto", "max_detections": "9"}
    used = as_trained(resolve(EvaluateConfig, given), checkpoint)
    assert (used.score_threshold, used.nms, used.max_detections, used.precision) == (0.02, "soft-nms", 9, "auto")


def test_a_setting_of_the_training_that_is_not_available_now_is_refused_unless_another_is_given(
    trained: train.TrainResult, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(_changed(trained.checkpoint, tmp_path / "best.pt", nms="Car:soft-nms:0.4"))
    with pytest.raises(SettingError, match=r"nms must be .nms. or .soft-nms., but got nms=Car:soft-nms:0.4"):
        as_trained(resolve(EvaluateConfig, {}), checkpoint)
    assert as_trained(resolve(EvaluateConfig, {"nms": "nms"}), checkpoint).nms == "nms"


def test_a_checkpoint_finds_its_data_from_another_folder(
    trained: train.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(load_checkpoint(trained.checkpoint).settings["data"]).parent)
    settings = with_absolute_paths(resolve(TrainConfig, {"data": "tiny", "image_labels": "none"}))
    assert Path(settings["data"]).is_absolute()
    checkpoint = load_checkpoint(_changed(trained.checkpoint, tmp_path / "best.pt", data=settings["data"]))
    monkeypatch.chdir(tmp_path)
    images = images_for_model(resolve(EvaluateConfig, {}), checkpoint.taxonomy, checkpoint.settings)
    assert len(images.index) == 6


def test_a_class_group_of_a_model_of_all_classes_has_its_scores(
    trained: train.TrainResult, evaluated: Path, workshop: Any
) -> None:
    whole = pd.read_csv(evaluated / "per_class_details.csv").set_index("class")
    checkpoint = load_checkpoint(trained.checkpoint)
    rarest = sorted(np.array(checkpoint.taxonomy.labels)[checkpoint.bins.bin_of_class == 0])
    for group, names in (("Car,Vehicle", ["Car", "Vehicle"]), ("bin:1", rarest)):
        output = workshop.folder / f"evaluated-{group}"
        given = {"from_run": trained.run_id, "class_group": group, "bootstrap": "20", "output": str(output)}
        run = evaluate.run(resolve(EvaluateConfig, {**given, "track": "false"}))
        table = pd.read_csv(output / "per_class_details.csv").set_index("class")
        assert sorted(table.index) == names
        pd.testing.assert_frame_equal(table.sort_index(), whole.loc[names])
        assert run.scores.mean_ap == pytest.approx(whole.loc[names, "ap"].mean(), nan_ok=True)
        # The images can be read again, for sample images and for merge.
        stored = read_matches(str(output))
        assert sorted(stored.class_names) == names
        assert ground_truth_digest(images_of_run(stored)) == stored.ground_truth


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"eval_split": "validation"}, "eval_split=validation"),
        ({"exhaustive": "false"}, "exhaustive=false"),
        ({"classes": "none"}, None),
        ({"eval_split": "train", "exhaustive": "true", "on_bad_row": "drop"}, None),
    ],
)
def test_a_choice_of_data_that_is_not_that_of_the_training_is_refused(
    given: dict[str, str], refused: str | None, tiny_dataset: Callable[..., Path]
) -> None:
    others = {"data": str(tiny_dataset()), "train_splits": "validation", "eval_split": "train", "exhaustive": "true"}
    settings = with_absolute_paths(resolve(TrainConfig, others))
    taxonomy = load_training_data(resolve(TrainConfig, others)).train.taxonomy
    config = resolve(EvaluateConfig, given)
    if refused is None:
        images = images_for_model(config, taxonomy, settings)
        assert len(images.index) == 12
        assert images.settings["on_bad_row"] == given.get("on_bad_row", "stop")
    else:
        with pytest.raises(SettingError, match=f"got data=trained, {refused}"):
            images_for_model(config, taxonomy, settings)


def test_paths_become_absolute_and_words_stay_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "group.txt").write_text("Car\n")
    given = {"data": "mine", "boxes": "a.csv,/b/c.csv", "classes": "k.csv", "hierarchy": "h.json"}
    found = with_absolute_paths(resolve(TrainConfig, {**given, "class_group": "group.txt"}))
    assert found["data"] == str(tmp_path / "mine")
    assert found["boxes"] == [str(tmp_path / "a.csv"), "/b/c.csv"]
    assert (found["classes"], found["hierarchy"]) == (str(tmp_path / "k.csv"), str(tmp_path / "h.json"))
    assert found["class_group"] == str(tmp_path / "group.txt")
    words = with_absolute_paths(resolve(TrainConfig, {"image_labels": "none", "weights": "imagenet"}))
    assert [words[name] for name in ("data", "image_labels", "hierarchy", "weights", "class_group", "classes")] == [
        "demo", "none", "auto", "imagenet", "all", None,
    ]  # fmt: skip
    # What a checkpoint holds can be made into settings again.
    assert resolve(TrainConfig, {**found, "config": None}).boxes[1] == Path("/b/c.csv")
