"""Rules for class groups become rules for the classes of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retinaflow.data.class_groups import PERSON
from retinaflow.detector.postprocess import PostprocessConfig
from retinaflow.inference.postprocess_settings import postprocess_config
from retinaflow.settings.groups import PostprocessFields
from retinaflow.taxonomy import Hierarchy, Taxonomy

PEOPLE = Taxonomy(("/m/04yx4", PERSON, "/m/0k4j"), ("Man", "Person", "Car"), Hierarchy(((PERSON, "/m/04yx4"),)))


def config_of(nms: str, taxonomy: Taxonomy = PEOPLE) -> PostprocessConfig:
    return postprocess_config(PostprocessFields(nms=nms), taxonomy)


def values(setting: Any) -> list[float]:
    return [round(value, 3) for value in torch.as_tensor(setting).tolist()]


def test_each_class_gets_the_way_and_the_number_of_its_group() -> None:
    config = config_of("people-clothing:soft-nms:0.3,rest:nms:0.6")
    assert config.nms == ("soft-nms", "soft-nms", "nms")
    assert values(config.soft_sigma) == [0.3, 0.3, 0.5]
    assert values(config.nms_iou) == [0.5, 0.5, 0.6]


def test_classes_that_no_rule_names_are_thinned_out_by_plain_nms() -> None:
    config = config_of("Man:support-nms:0.7")
    assert config.nms == ("support-nms", "nms", "nms")
    assert values(config.support_power) == [0.7, 1.0, 1.0]


def test_one_rule_for_all_classes_is_one_way() -> None:
    assert config_of("soft-nms").nms == "soft-nms"
    assert config_of("people-clothing:nms,rest:nms").nms == "nms"


def test_a_group_without_a_class_of_the_model_is_no_error() -> None:
    cars = PEOPLE.subset([2])
    assert config_of("people-clothing:soft-nms,rest:nms", cars).nms == "nms"


@pytest.mark.parametrize(
    ("nms", "words"),
    [
        ("Man:nms:0.7,people-clothing:nms", "must have one rule, but Man is in Man and people-clothing"),
        ("Mann:nms", "nms=Mann: no class has the id or name 'Mann'"),
        ("bin:1:soft-nms", "nms=bin:1: bin:K needs a bin number"),
    ],
)
def test_a_rule_that_fits_no_class_or_a_class_of_another_rule_is_an_error(nms: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(nms)
