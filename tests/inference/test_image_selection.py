"""Which images a command looks at: a split that is given is that split, whatever its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from retinaflow.data.training_data import load_training_data
from retinaflow.inference.image_selection import is_evaluated, known_ground_truth, wanted_images
from retinaflow.settings.commands import PredictConfig, TrainConfig, VisualizeConfig
from retinaflow.settings.resolve import resolve, with_absolute_paths


@pytest.fixture
def trained(tiny_dataset: Callable[..., Path]) -> Mapping[str, Any]:
    """The settings of a training on the validation images, evaluated on those of train."""
    given = {"data": str(tiny_dataset()), "train_splits": "validation", "eval_split": "train"}
    return with_absolute_paths(resolve(TrainConfig, given))


@pytest.mark.parametrize("kind", [PredictConfig, VisualizeConfig])
@pytest.mark.parametrize(("given", "split"), [({}, "train"), ({"split": "validation"}, "validation")])
def test_the_default_split_when_given_is_not_that_of_the_training(
    kind: type[PredictConfig] | type[VisualizeConfig],
    given: Mapping[str, str],
    split: str,
    trained: Mapping[str, Any],
) -> None:
    config = resolve(kind, given)
    taxonomy = load_training_data(resolve(TrainConfig, {**trained, "config": None})).train.taxonomy
    found = wanted_images(config, taxonomy, trained).index.image_ids.tolist()
    assert found
    assert {name[: len(split)] for name in found} == {split}
    shown = known_ground_truth(config, taxonomy, trained)
    assert shown is not None
    # Those without a box are not listed.
    assert len(shown)
    assert set(shown.image_ids.tolist()) <= set(found)


def test_a_training_with_images_taken_out_has_not_been_evaluated_on_a_whole_split() -> None:
    trained = {"data": "mine", "eval_split": "validation", "eval_ids": "/ids.txt"}
    assert is_evaluated(resolve(PredictConfig, {}), trained)
    assert not is_evaluated(resolve(PredictConfig, {"split": "validation"}), trained)
    assert is_evaluated(resolve(PredictConfig, {"split": "validation"}), {**trained, "eval_ids": None})
    assert not is_evaluated(resolve(PredictConfig, {"data": "other"}), trained)
