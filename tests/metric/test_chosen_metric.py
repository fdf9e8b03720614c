"""Metrics by name: which there are, what is refused, weighted means, and names that a tracking server accepts."""

from __future__ import annotations

import re

import pytest

from retinaflow.errors import SettingError
from retinaflow.metric.chosen_metric import ChosenMetric, logged_name
from retinaflow.settings.value_types import metric_target, metric_weights
from retinaflow.taxonomy import Taxonomy

TAXONOMY = Taxonomy(("/m/a", "/m/b", "/m/c", "/m/d"), ("Car", "Bus", "Cup", "Cup"))
KNOWN = {
    "val/mAP": 0.3,
    "val/mAP_rare": 0.1,
    "val/mAP_bin_1": 0.2,
    "val/mAP_bin_2": 0.4,
    "val/coco_AP": 0.15,
    "val/AP/Car": 0.5,
    "val/AP/Cup (/m/c)": 0.1,
}


def read(*names: str) -> ChosenMetric:
    return ChosenMetric.read("keep_best", metric_weights(names), KNOWN, TAXONOMY)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["val/mAP"], 0.3),
        (["val/coco_AP"], 0.15),
        (["val/AP/Car"], 0.5),
        (["val/AP//m/a"], 0.5),
        (["val/AP/car"], 0.5),
        (["val/AP//m/c"], 0.1),
        (["val/AP/Cup (/m/c)"], 0.1),
        # (2 * 0.1 + 0.3) / 3
        (["val/mAP_rare:2", "val/mAP:1"], 0.5 / 3),
        (["val/mAP_rare:2", "val/mAP"], 0.5 / 3),
        # One metric in two ways: (0.5 + 3 * 0.5 + 4 * 0.2) / 8
        (["val/AP/Car", "val/AP//m/a:3", "val/mAP_bin_1:4"], 2.8 / 8),
    ],
)
def test_a_name_or_a_weighted_mean_has_its_value(names: list[str], value: float) -> None:
    assert read(*names).value(KNOWN) == pytest.approx(value)


GROUPS = "there are val/mAP, val/mAP_rare, val/mAP_bin_1, val/mAP_bin_2, val/coco_AP, val/AP/Car, val/AP/Cup (/m/c)"
REFUSED = {
    "a bin beyond those": ("val/mAP_bin_3", f"got val/mAP_bin_3; did you mean val/mAP_bin_2?; {GROUPS}"),
    "misspelt": ("val/map_rare", f"got val/map_rare; did you mean val/mAP_rare?; {GROUPS}"),
    "another word": ("loss", f"got loss; {GROUPS}"),
    "no such class": (
        "val/AP/Cat",
        f"must name a class, but got val/AP/Cat: no class has the id or name 'Cat'; did you mean Car?; {GROUPS}",
    ),
    "name of two": ("val/AP/Cup", "is not unique; use one of the ids /m/c, /m/d"),
    "no box": ("val/AP/Bus", f"got val/AP/Bus, and no evaluated image has a box of Bus; {GROUPS}"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused_with_what_there_is(case: tuple[str, str]) -> None:
    with pytest.raises(SettingError) as raised:
        read("val/mAP", case[0])
    assert str(raised.value).startswith("keep_best ")
    assert case[1] in str(raised.value)


def test_without_any_ground_truth_names_are_taken_and_have_no_value() -> None:
    metric = ChosenMetric.read("keep_best", {"val/mAP": 1.0}, {}, TAXONOMY)
    assert metric.value({}) is None


def test_classes_are_logged_under_names_that_a_server_accepts() -> None:
    assert read("val/AP//m/c", "val/mAP").of_classes(KNOWN) == {"val/AP/Cup __m_c_": 0.1}
    for name in ("val/AP/Cup (/m/c)", "val/AP/Fish & chips, fried", "val/AP/..", "val/AP/größer", "val/AP/a/b"):
        assert re.fullmatch(r"val/AP/[\w.\- :]+", logged_name(name)), name
    assert logged_name("val/AP/Traffic light") == "val/AP/Traffic light"


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["val/mAP"], {"val/mAP": 1.0}),
        (["val/mAP:0.5", "val/mAP_rare:2"], {"val/mAP": 0.5, "val/mAP_rare": 2.0}),
        (["val/AP/Time: 12:30"], {"val/AP/Time: 12": 30.0}),
        (["val/AP/a:b"], {"val/AP/a:b": 1.0}),
    ],
)
def test_the_last_number_after_a_colon_is_the_weight(names: list[str], weights: dict[str, float]) -> None:
    assert metric_weights(names) == weights


def test_a_target_is_a_metric_and_a_value() -> None:
    assert metric_target("val/AP/a:b:0.25") == ("val/AP/a:b", 0.25)
    for text in ("val/mAP", "0.3", ":0.3", "val/mAP:high"):
        with pytest.raises(ValueError, match=text):
            metric_target(text)
