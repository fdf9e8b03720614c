"""A detector over an index: every image once, whatever the batches, and the network left as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retinaflow.data.batching import AspectBuckets
from retinaflow.detections import Detections
from retinaflow.detector.network import RetinaNet
from retinaflow.inference.checkpoint import on_device
from retinaflow.inference.detector import Detector, by_image
from retinaflow.settings.model_settings import PostprocessSettings

CPU = torch.device("cpu")
EVERYTHING = PostprocessSettings(score_threshold=0.0, max_detections=20)


def _detector(lab: Any, network: RetinaNet | None = None, *, batch_size: int = 4) -> Detector:
    return Detector(
        network=network or on_device(lab.model(seed=0), CPU),
        taxonomy=lab.index.taxonomy,
        buckets=lab.buckets,
        postprocess=EVERYTHING,
        ancestors=None,
        device=CPU,
        precision="float32",
        batch_size=batch_size,
        workers=0,
    )


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_detections_do_not_depend_on_the_batch_size(lab: Any, num_buckets: int) -> None:
    buckets = AspectBuckets.fit(lab.index.sizes, image_size=64, num_buckets=num_buckets)
    lab = type(lab)(lab.index, lab.bins, buckets)
    one = _detector(lab, batch_size=1).detect(lab.index)
    assert len(one) == 20 * len(lab.index)
    many = _detector(lab, batch_size=5).detect(lab.index)
    assert np.array_equal(one.image_index, many.image_index)
    assert np.array_equal(one.class_index, many.class_index)
    np.testing.assert_allclose(one.score, many.score, atol=1e-5)
    np.testing.assert_allclose(one.boxes, many.boxes, atol=1e-4)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_every_image_is_seen_exactly_once(lab: Any, batch_size: int) -> None:
    done: list[int] = []
    found = _detector(lab, batch_size=batch_size).detect(lab.index, after_batch=done.append)
    assert sum(done) == len(lab.index)
    assert max(done) <= batch_size
    assert np.array_equal(np.unique(found.image_index), np.arange(len(lab.index)))


def test_images_are_in_order_and_the_best_score_first_within_one(lab: Any) -> None:
    found = _detector(lab).detect(lab.index)
    assert np.array_equal(np.lexsort((-found.score, found.image_index)), np.arange(len(found)))


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_detections_of_several_ranks_are_those_of_one(lab: Any, world_size: int) -> None:
    detector = _detector(lab, batch_size=2)
    whole = detector.detect(lab.index)
    parts = [detector.detect(lab.index, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = by_image(Detections.concatenate(parts))
    for name in ("image_index", "class_index", "score", "boxes"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name


def test_boxes_are_normalised_to_the_image(lab: Any) -> None:
    found = _detector(lab).detect(lab.index)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 1


@pytest.mark.parametrize("training", [True, False], ids=["in training", "in use"])
def test_the_network_keeps_its_mode_and_its_statistics(lab: Any, training: bool) -> None:
    network = on_device(lab.model(seed=0), CPU).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    _detector(lab, network).detect(lab.index)
    assert network.training is training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_stop_from_after_batch_ends_it_and_leaves_the_mode(lab: Any) -> None:
    def stop(images: int) -> None:
        del images
        raise TimeoutError

    network = on_device(lab.model(seed=0), CPU).train()
    with pytest.raises(TimeoutError):
        _detector(lab, network).detect(lab.index, after_batch=stop)
    assert network.training


def test_detections_of_a_class_are_copied_to_its_ancestors_on_request(lab: Any) -> None:
    """Class 0 (Car) is below class 1 (Vehicle): with room for all, every car is a vehicle of the same score or less."""
    plain = replace(_detector(lab), postprocess=PostprocessSettings(score_threshold=0.0, max_detections=1000))
    found = plain.detect(lab.index)
    expanded = replace(plain, ancestors=torch.from_numpy(lab.index.taxonomy.is_ancestor)).detect(lab.index)
    cars = found.class_index == 0
    assert cars.any()
    for image in np.unique(found.image_index[cars]):
        best_car = found.score[cars & (found.image_index == image)].max()
        vehicles = expanded.score[(expanded.class_index == 1) & (expanded.image_index == image)]
        assert vehicles.max() >= best_car


def test_the_bytes_of_a_file_give_the_detections_of_the_image(lab: Any) -> None:
    detector = _detector(lab, batch_size=1)
    found = detector.detect(lab.index.take(np.array([3])))
    data = np.fromfile(lab.index.file_of(3), dtype=np.uint8)
    alone = detector.detect_file(data, tuple(lab.index.sizes[3].tolist()))
    for name in ("image_index", "class_index", "score", "boxes"):
        assert np.array_equal(getattr(alone, name), getattr(found, name)), name
