"""The ONNX graph, run by onnxruntime, gives the detections of the detector."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from retinaflow.detector.network import RetinaNet
from retinaflow.detector.onnx import onnx_detector
from retinaflow.detector.postprocess import detect
from retinaflow.settings.model_settings import PostprocessSettings
from retinaflow.settings.training_settings import NetworkSettings

onnxruntime = pytest.importorskip("onnxruntime")
CONFIG = PostprocessSettings(score_threshold=0.02, max_detections=50)


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    """A detector with random weights that finds things: its logits are spread out."""
    network = NetworkSettings(backbone="resnet18", fpn_channels=64, head_norm="group", head_depth=1, anchor_scale=2.5)
    model = RetinaNet(network, 4, seed=3).eval()
    with torch.no_grad():
        for name, spread in (("classification_head.cls_logits", 12.0), ("regression_head.bbox_reg", 2.0)):
            model.head.get_submodule(name).weight.mul_(spread)
    return model


@pytest.fixture(scope="module")
def session(model: RetinaNet) -> Any:
    graph = onnx_detector(model, CONFIG, notes={"class_ids": json.dumps(["a", "b", "c", "d"])})
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "given",
    [
        {"candidates_per": "class"},
        {"max_detections_per_class": 3},
        {"candidates_per": "class", "max_detections_per_class": 7},
    ],
    ids=str,
)
def test_limits_by_class_are_those_of_the_detector(given: dict[str, Any], model: RetinaNet) -> None:
    config = CONFIG.model_copy(update=given)
    graph = onnx_detector(model, config, notes={})
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (2, 75, 101, 3), dtype=np.uint8)
    boxes, scores, labels = session.run(None, {"images": images})
    with torch.no_grad():
        expected = detect(model(torch.from_numpy(images).permute(0, 3, 1, 2)), model.anchors((75, 101)), config=config)
    for image in range(2):
        found, own = scores[image] > 0, expected.owner == image
        assert found.sum() == own.sum() > 10
        np.testing.assert_allclose(scores[image][found], expected.score[own], atol=1e-3)
        np.testing.assert_allclose(boxes[image][found], expected.boxes[own], atol=1e-3)
        assert labels[image][found].tolist() == expected.label[own].tolist()


# Two images at once; sides that are no multiple of the strides; one level larger than top_k and one smaller.
@pytest.mark.parametrize("shape", [(1, 96, 64), (2, 64, 160), (1, 75, 101)], ids=str)
def test_detections_are_those_of_the_detector(model: RetinaNet, session: Any, shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    boxes, scores, labels = session.run(None, {"images": images})
    with torch.no_grad():
        output = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = detect(output, model.anchors(shape[1:]), config=CONFIG)
    assert scores.shape == (shape[0], 50)
    assert (np.diff(scores, axis=1) <= 0).all()
    for image in range(shape[0]):
        found = scores[image] > 0
        own = expected.owner == image
        assert found.sum() == own.sum() > 10
        np.testing.assert_allclose(scores[image][found], expected.score[own], atol=1e-3)
        np.testing.assert_allclose(boxes[image][found], expected.boxes[own], atol=1e-3)
        assert labels[image][found].tolist() == expected.label[own].tolist()


def test_an_image_without_detections_has_scores_of_zero(model: RetinaNet) -> None:
    strict = PostprocessSettings(score_threshold=0.999999, max_detections=5)
    graph = onnx_detector(model, strict, notes={})
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert not session.run(["scores"], {"images": np.zeros((1, 64, 64, 3), dtype=np.uint8)})[0].any()


def test_what_the_graph_tells_of_itself(session: Any) -> None:
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_ids"]) == ["a", "b", "c", "d"]
    assert [one.name for one in session.get_outputs()] == ["boxes", "scores", "labels"]


def test_soft_suppression_is_refused(model: RetinaNet) -> None:
    with pytest.raises(ValueError, match="can do plain NMS only, but got nms=soft-nms"):
        onnx_detector(model, PostprocessSettings(nms="soft-nms"), notes={})
