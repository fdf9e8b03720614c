"""The written rules of how overlapping detections are suppressed."""

from __future__ import annotations

import pytest

from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.settings.suppression import Rule, read_rules


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("nms", [Rule("all", "nms", None)]),
        ("soft-nms:0.3", [Rule("all", "soft-nms", 0.3)]),
        (
            "people-clothing:support-nms, rest:nms:0.6",
            [Rule("people-clothing", "support-nms", None), Rule("rest", "nms", 0.6)],
        ),
        ("bin:1:nms:0.7,/m/01g317:soft-nms", [Rule("bin:1", "nms", 0.7), Rule("/m/01g317", "soft-nms", None)]),
    ],
)
def test_a_rule_names_its_group_its_way_and_its_number(text: str, rules: list[Rule]) -> None:
    assert list(read_rules(text)) == rules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hard", r"\[GROUP:\]WAY\[:NUMBER\] with one of the ways nms, soft-nms, support-nms"),
        ("rest:nms,", "but one is '\\(empty\\)'"),
        ("nms:1.5", "the number of nms is the IoU, in \\(0, 1\\], but one is '1.5'"),
        ("Man:soft-nms:none", "the number of soft-nms is sigma, above 0"),
        ("support-nms:0", "the number of support-nms is the power, above 0"),
        ("rest:nms,rest:soft-nms", "a group must have one rule, but rest has 2"),
        ("nms,rest:soft-nms", "must stand alone"),
    ],
)
def test_what_is_no_rule_is_named_with_what_would_be_one(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_rules(text)


def test_a_setting_that_is_no_rule_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"nms: the number of nms is the IoU, in \(0, 1\], but got nms=rest:nms:2"):
        resolve(TrainConfig, {"nms": "rest:nms:2"})
