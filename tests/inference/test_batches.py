"""Detections over an index: every image once, whatever the batches, and the model left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retinaflow.data.batching import AspectBuckets
from retinaflow.detections import Detections
from retinaflow.detector.network import RetinaNet
from retinaflow.inference.batches import detect
from retinaflow.inference.checkpoint import on_device
from retinaflow.settings.model_groups import PostprocessSettings

CPU = torch.device("cpu")
EVERYTHING = PostprocessSettings(score_threshold=0.0, max_detections=20)


def _model(lab: Any) -> RetinaNet:
    return on_device(lab.model(seed=0), CPU)


def _detect(lab: Any, model: RetinaNet, batch_size: int, **more: Any) -> Detections:
    parts = detect(model, lab.index, lab.buckets, config=EVERYTHING, batch_size=batch_size, device=CPU, **more)
    return Detections.concatenate(list(parts))


def _ordered(found: Detections) -> Detections:
    return found.take(np.lexsort((-found.score, found.image_index)))


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_detections_do_not_depend_on_the_batch_size(lab: Any, num_buckets: int) -> None:
    buckets = AspectBuckets.fit(lab.index.sizes, image_size=64, num_buckets=num_buckets)
    lab = type(lab)(lab.index, lab.bins, buckets)
    model = _model(lab)
    one = _ordered(_detect(lab, model, 1))
    assert len(one) == 20 * len(lab.index)
    many = _ordered(_detect(lab, model, 5))
    assert np.array_equal(one.image_index, many.image_index)
    assert np.array_equal(one.class_index, many.class_index)
    np.testing.assert_allclose(one.score, many.score, atol=1e-5)
    np.testing.assert_allclose(one.boxes, many.boxes, atol=1e-4)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_every_image_is_seen_exactly_once(lab: Any, batch_size: int) -> None:
    done: list[int] = []
    found = _detect(lab, _model(lab), batch_size, after_batch=done.append)
    assert sum(done) == len(lab.index)
    assert max(done) <= batch_size
    assert np.array_equal(np.unique(found.image_index), np.arange(len(lab.index)))


def test_boxes_are_normalised_to_the_image(lab: Any) -> None:
    found = _detect(lab, _model(lab), 4)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 1


@pytest.mark.parametrize("training", [True, False], ids=["in training", "in use"])
def test_the_model_keeps_its_mode_and_its_statistics(lab: Any, training: bool) -> None:
    model = _model(lab).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _detect(lab, model, 4)
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stop_from_after_batch_ends_it_and_leaves_the_mode(lab: Any) -> None:
    def stop(images: int) -> None:
        del images
        raise TimeoutError

    model = _model(lab).train()
    with pytest.raises(TimeoutError):
        _detect(lab, model, 4, after_batch=stop)
    assert model.training


def test_detections_of_a_class_are_copied_to_its_ancestors_on_request(lab: Any) -> None:
    """Class 0 (Car) is below class 1 (Vehicle): with room for all, every car is a vehicle of the same score or less."""
    ancestors = torch.from_numpy(lab.index.taxonomy.is_ancestor)
    model = _model(lab)
    config = PostprocessSettings(score_threshold=0.0, max_detections=1000)
    plain, expanded = (
        Detections.concatenate(
            list(detect(model, lab.index, lab.buckets, config=config, expand_to=to, batch_size=4, device=CPU))
        )
        for to in (None, ancestors)
    )
    cars = plain.class_index == 0
    assert cars.any()
    for image in np.unique(plain.image_index[cars]):
        best_car = plain.score[cars & (plain.image_index == image)].max()
        vehicles = expanded.score[(expanded.class_index == 1) & (expanded.image_index == image)]
        assert vehicles.max() >= best_car
