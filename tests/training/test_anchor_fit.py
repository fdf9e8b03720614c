"""Which classes the anchors of a training miss, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retinaflow.commands import explore, train
from retinaflow.data.batching import AspectBuckets
from retinaflow.settings.commands import ExploreConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.anchor_fit import BoxSample, advice, class_reach, reach_of_settings

BUCKETS = AspectBuckets(((128, 128),))


def sample(sides: dict[str, float], *, each: int = 20) -> BoxSample:
    """Squares of ``sides`` pixels in images of 128, each class by itself, spread over the image."""
    random = np.random.default_rng(0)
    side = np.repeat(list(sides.values()), each) / 128
    corner = random.uniform(0, 1, (len(side), 2)) * (1 - side[:, None])
    boxes = np.concatenate([corner, corner + side[:, None]], axis=1).astype(np.float32)
    labels = np.repeat(np.arange(len(sides)), each)
    return BoxSample(tuple(sides), boxes, labels, np.full((len(side), 2), 640))


def said(drawn: BoxSample, **given: Any) -> str | None:
    """The advice for anchors of scale 4."""
    return advice(class_reach(drawn, BUCKETS, 4.0), drawn, BUCKETS, 4.0, **given)


def test_classes_below_the_smallest_anchor_are_named_with_a_scale_that_matches_them() -> None:
    line = said(sample({"Bee": 12, "Cow": 48}))
    assert line is not None
    assert "the smallest of 32 pixels, match few boxes of 1 of 2 classes" in line
    assert "Bee (0%, median side 12 pixels)" in line
    assert "Cow" not in line
    assert "or anchor_scale=2 (a mean over classes of 75% instead of 50%)" in line


def test_a_published_detector_keeps_its_anchors() -> None:
    line = said(sample({"Bee": 12, "Cow": 48}), scales=())
    assert line is not None
    assert line.endswith("use a larger image_size")


def test_there_is_no_advice_when_anchors_match_the_boxes() -> None:
    assert said(sample({"Cow": 48, "Horse": 64})) is None


def test_many_missed_classes_are_counted_and_not_all_named() -> None:
    line = said(sample({f"Bee {number}": 6 for number in range(9)}))
    assert line is not None
    assert "9 of 9 classes" in line
    assert "and 4 more" in line


def test_the_table_begins_with_the_least_matched_class() -> None:
    table = class_reach(sample({"Cow": 48, "Bee": 12}), BUCKETS, 4.0)
    assert table["label"].tolist() == ["Bee", "Cow"]
    np.testing.assert_allclose(table["median_side"], [12, 48], rtol=1e-5)
    assert table["reached"].tolist() == [0.0, 1.0]


def test_larger_images_match_more() -> None:
    table = reach_of_settings(sample({"Bee": 16, "Cow": 48}), np.full((3, 2), 640), image_size=128, num_buckets=1)
    assert table.index.tolist() == [128, 192, 256]
    assert table["anchor_scale=4"].tolist() == [0.5, 1.0, 1.0]


def test_group_of_boxes_are_left_out_and_each_class_is_bounded(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from retinaflow.data.training_data import load_training_data
    from retinaflow.training import anchor_fit

    monkeypatch.setattr(anchor_fit, "_SAMPLE", 2)
    index = load_training_data(workshop.settings()).train
    drawn = BoxSample.draw(index)
    single = pd.Series(np.asarray(index.labels)[~np.asarray(index.is_group_of)]).value_counts()
    assert pd.Series(drawn.labels).value_counts().to_dict() == single.clip(upper=2).to_dict()


@pytest.mark.slow
def test_explore_and_train_print_it(workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data": str(workshop.data), "track": False, "output": tmp_path / "explored"}
    settings |= {"image_size": 32, "anchor_scale": 4}
    page = explore.run(resolve(ExploreConfig, settings))
    assert "anchors, the smallest of 32 pixels, match few boxes" in capsys.readouterr().out
    assert "Anchors, the smallest of 32 pixels, match few boxes" in page.read_text(encoding="utf-8")
    assert pd.read_csv(page.with_name("anchors.csv"))["reached"].min() < 0.5
    train.run(workshop.settings(track=False, output=tmp_path / "trained", anchor_scale=6, epochs=1))
    assert "anchors, the smallest of 48 pixels, match few boxes" in capsys.readouterr().out
