"""The detector as one ONNX graph: image in, detections out, no code of ours needed to run it.

Input ``images [B, H, W, 3]`` uint8 RGB, any B, H and W (the detector was trained on certain shapes). Outputs, M the
most detections of an image, best first: ``boxes [B, M, 4]`` float32 xyxy, normalised to [0, 1], ``scores [B, M]``
float32 and ``labels [B, M]`` int64. A score of 0 marks rows after the last detection.

The network is written by ``torch.onnx.export``. What follows it, the steps of :mod:`retinaflow.detector.postprocess`
with plain NMS, is put together node by node, as its shapes depend on the data: anchors from the image's shape,
the best candidates of each level, boxes, ``NonMaxSuppression`` by class, the best of each image.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from retinaflow.detector.anchors import LEVEL_STRIDES, MAX_LOG_SCALE, cell_anchors
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.postprocess import TOP_K
from retinaflow.errors import SettingError
from retinaflow.settings.model_settings import PostprocessSettings

OPSET = 18
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")


def onnx_detector(model: RetinaNet, config: PostprocessSettings, *, notes: Mapping[str, str]) -> Any:
    """The graph as an ``onnx.ModelProto``; ``notes`` become its metadata.

    Raises SettingError for Soft-NMS, which the graph cannot do, and for a backbone whose graph would be right for one
    image size only (a Swin Transformer), and ImportError without onnx and onnxruntime.
    """
    if config.nms != "nms":
        raise SettingError(f"an ONNX graph can do plain NMS only, but got nms={config.nms}; give nms=nms")
    import onnx

    proto = _exported(model)
    _check_another_size(proto, model)
    nodes = _Nodes(proto.graph)
    results = _detections(nodes, "class_logits", "box_deltas", model, config)
    del proto.graph.output[:]
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    for name, result, kind in zip(OUTPUTS, results, kinds, strict=True):
        nodes("Identity", result, output=name)
        shape: list[str | int | None] = ["batch", "detections", *([4] if name == "boxes" else [])]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    for key, value in notes.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(proto)
    return proto


class _Network(nn.Module):
    """Images with their channels last -> logits and offsets."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(images.permute(0, 3, 1, 2))
        return output.class_logits, output.box_deltas


def _exported(model: RetinaNet) -> Any:
    """The network as a ModelProto with outputs ``class_logits`` and ``box_deltas``."""
    import onnx

    # Two images of unequal sides, so that no size is taken for a constant.
    example = torch.zeros(2, 128, 160, 3, dtype=torch.uint8, device=model.mean.device)
    axes = {INPUT: {0: "batch", 1: "height", 2: "width"}}
    axes |= {name: {0: "batch", 1: "anchors"} for name in ("class_logits", "box_deltas")}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            _Network(model).eval(),
            (example,),
            str(path),
            input_names=[INPUT],
            output_names=["class_logits", "box_deltas"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        return onnx.load(path)


@torch.no_grad()
def _check_another_size(proto: Any, model: RetinaNet) -> None:
    """Raise SettingError when the graph is not the network for a size that it was not traced with.

    A trace turns decisions of Python into constants, such as whether a window fits into a map.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (1, 64, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = _Network(model).eval()(images.to(model.mean.device))
    try:
        found = session.run(["class_logits", "box_deltas"], {INPUT: images.numpy()})
    except (Fail, InvalidArgument, RuntimeException):
        found = []
    fits = [
        np.abs(values - own.cpu().numpy()).max() <= 0.01 * float(own.std())
        for values, own in zip(found, expected, strict=False)
    ]
    if not fits or not all(fits):
        raise SettingError(
            f"an ONNX graph must be right for images of any size, but that of backbone={model.config.backbone} is for "
            "one size only; a convolutional backbone has no such limit"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs deprecations, and warns of every shape that a trace turns into a number."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Nodes:
    """Adds nodes to a graph: ``nodes("Add", a, b)`` gives the name of the sum. Arrays and numbers become constants."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._count = 0

    def __call__(self, kind: str, *inputs: str | ArrayLike, output: str | None = None, **attributes: Any) -> str:
        return self.several(kind, *inputs, outputs=[output or self._name()], **attributes)[0]

    def several(self, kind: str, *inputs: str | ArrayLike, outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """The same for a kind of several outputs; one without a name is not made."""
        import onnx

        names = [value if isinstance(value, str) else self._constant(np.asarray(value)) for value in inputs]
        self._graph.node.append(onnx.helper.make_node(kind, names, list(outputs), **attributes))
        return outputs

    def top(self, values: str, count: str) -> tuple[str, str]:
        """The largest values along the last axis and their indices, best first."""
        one = self("Reshape", count, [1])
        best, index = self.several("TopK", values, one, outputs=[self._name(), self._name()], axis=-1)
        return best, index

    def _constant(self, value: Any) -> str:
        import onnx

        value = value.astype(np.float32) if value.dtype == np.float64 else value
        name = self._name()
        self._graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"detect_{self._count}"


def _detections(
    nodes: _Nodes, logits: str, deltas: str, model: RetinaNet, config: PostprocessSettings
) -> tuple[str, str, str]:
    """Boxes ``[B, M, 4]``, scores and labels ``[B, M]``."""
    size = nodes("Shape", INPUT, start=1, end=3)
    height, width = nodes("Gather", size, 0), nodes("Gather", size, 1)
    anchors, counts = _anchors(nodes, height, width, model.config.anchor_scale)
    by_class = config.candidates_per == "class"
    scores, pairs = (_of_classes if by_class else _of_levels)(nodes, logits, counts, model.num_classes)
    hopeful = nodes("Greater", scores, np.float32(config.score_threshold))
    scores = nodes("Where", hopeful, scores, np.float32(0))
    anchor, labels = nodes("Div", pairs, model.num_classes), nodes("Mod", pairs, model.num_classes)
    near = nodes("Gather", anchors, anchor, axis=0)
    own = nodes("GatherND", deltas, nodes("Unsqueeze", anchor, [2]), batch_dims=1)
    corner = nodes("Cast", nodes("Concat", *(nodes("Reshape", side, [1]) for side in (width, height)), axis=0), to=1)
    boxes = _decoded(nodes, own, near, corner)
    if by_class:
        kept = _suppressed_by_class(nodes, boxes, scores, model.num_classes, config)
    else:
        kept = _suppressed(nodes, boxes, scores, labels, model.num_classes, config)
    most = nodes("Min", nodes("Gather", nodes("Shape", kept), 1), config.max_detections)
    best, index = nodes.top(kept, most)
    chosen = nodes("GatherND", boxes, nodes("Unsqueeze", index, [2]), batch_dims=1)
    scale = nodes("Concat", corner, corner, axis=0)
    return nodes("Div", chosen, scale), best, nodes("GatherElements", labels, index, axis=1)


def _anchors(nodes: _Nodes, height: str, width: str, anchor_scale: float) -> tuple[str, list[str]]:
    """Anchors ``[A, 4]`` of all levels, and how many each level has: as ``anchors.anchor_grid`` makes them."""
    levels, counts = [], []
    for stride in LEVEL_STRIDES:
        # Cells are size // cells apart, not the nominal stride.
        rows, columns = (nodes("Div", nodes("Add", side, stride - 1), stride) for side in (height, width))
        ys, xs = (
            nodes("Cast", nodes("Mul", nodes("Range", 0, cells, 1), nodes("Div", side, cells)), to=1)
            for cells, side in ((rows, height), (columns, width))
        )
        shape = nodes("Concat", *(nodes("Reshape", cells, [1]) for cells in (rows, columns)), axis=0)
        grid_y = nodes("Expand", nodes("Unsqueeze", ys, [1]), shape)
        grid_x = nodes("Expand", nodes("Unsqueeze", xs, [0]), shape)
        middles = [nodes("Reshape", grid, [-1, 1, 1]) for grid in (grid_x, grid_y, grid_x, grid_y)]
        cells = cell_anchors(stride, anchor_scale).numpy()
        level = nodes("Reshape", nodes("Add", nodes("Concat", *middles, axis=2), cells), [-1, 4])
        levels.append(level)
        counts.append(nodes("Gather", nodes("Shape", level), [0]))
    return nodes("Concat", *levels, axis=0), counts


def _of_levels(nodes: _Nodes, logits: str, counts: Sequence[str], num_classes: int) -> tuple[str, str]:
    """Scores ``[B, N]`` and anchor * K + class of the best of each level."""
    scores, pairs = [], []
    first = nodes("Identity", [0])
    for part, count in zip(_levels(nodes, logits, counts), counts, strict=True):
        flat = nodes("Sigmoid", nodes("Flatten", part, axis=1))
        size = nodes("Mul", count, num_classes)
        best, index = nodes.top(flat, nodes("Min", size, np.array([TOP_K])))
        scores.append(best)
        pairs.append(nodes("Add", index, nodes("Mul", first, num_classes)))
        first = nodes("Add", first, count)
    return nodes("Concat", *scores, axis=1), nodes("Concat", *pairs, axis=1)


def _of_classes(nodes: _Nodes, logits: str, counts: Sequence[str], num_classes: int) -> tuple[str, str]:
    """Scores ``[B, K * N]`` and anchor * K + class of the best of each class of each level, class by class."""
    scores, anchors = [], []
    first = nodes("Identity", [0])
    for part, count in zip(_levels(nodes, logits, counts), counts, strict=True):
        columns = nodes("Sigmoid", nodes("Transpose", part, perm=[0, 2, 1]))
        best, index = nodes.top(columns, nodes("Min", count, np.array([TOP_K])))
        scores.append(best)
        anchors.append(nodes("Add", index, first))
        first = nodes("Add", first, count)
    score, anchor = nodes("Concat", *scores, axis=2), nodes("Concat", *anchors, axis=2)
    pair = nodes("Add", nodes("Mul", anchor, num_classes), np.arange(num_classes)[None, :, None])
    return nodes("Flatten", score, axis=1), nodes("Flatten", pair, axis=1)


def _levels(nodes: _Nodes, logits: str, counts: Sequence[str]) -> Sequence[str]:
    """The logits ``[B, a, K]`` of each level."""
    names = [f"level_{number}" for number in range(len(counts))]
    return nodes.several("Split", logits, nodes("Concat", *counts, axis=0), outputs=names, axis=1)


def _decoded(nodes: _Nodes, deltas: str, anchors: str, corner: str) -> str:
    """Boxes ``[B, N, 4]`` in pixels, clipped to the image, whose (width, height) ``corner`` is: ``anchors.decode``."""
    low, high = (nodes("Slice", anchors, [first], [first + 2], [2]) for first in (0, 2))
    shift, growth = (nodes("Slice", deltas, [first], [first + 2], [2]) for first in (0, 2))
    sizes = nodes("Sub", high, low)
    centres = nodes("Add", low, nodes("Mul", sizes, np.float32(0.5)))
    middles = nodes("Add", nodes("Mul", shift, sizes), centres)
    factors = nodes("Exp", nodes("Min", growth, np.float32(MAX_LOG_SCALE)))
    halves = nodes("Mul", nodes("Mul", factors, sizes), np.float32(0.5))
    ends = (nodes(kind, middles, halves) for kind in ("Sub", "Add"))
    clipped = [nodes("Min", nodes("Max", end, np.float32(0)), corner) for end in ends]
    return nodes("Concat", *clipped, axis=2)


def _suppressed(
    nodes: _Nodes, boxes: str, scores: str, labels: str, num_classes: int, config: PostprocessSettings
) -> str:
    """Scores ``[B, N]``, 0 where a better box of the same class and image overlaps too much."""
    is_of_class = nodes("Equal", nodes("Unsqueeze", labels, [1]), np.arange(num_classes)[None, :, None])
    by_class = nodes("Where", is_of_class, nodes("Unsqueeze", scores, [1]), np.float32(0))
    # A box is a candidate of one class.
    index = nodes("Gather", _chosen(nodes, boxes, by_class, config), [0, 2], axis=1)
    return nodes("Mul", scores, _marked(nodes, scores, index))


def _suppressed_by_class(nodes: _Nodes, boxes: str, scores: str, num_classes: int, config: PostprocessSettings) -> str:
    """The same for candidates ``[B, K * N]`` class by class: each class is an image of one class."""
    # Reshaping to -1 rows fails for an empty batch, so the number of candidates of a class is computed.
    each = nodes("Div", nodes("Gather", nodes("Shape", scores), [1]), num_classes)
    groups = nodes("Mul", nodes("Gather", nodes("Shape", scores), [0]), num_classes)
    own_boxes = nodes("Reshape", boxes, nodes("Concat", groups, each, [4], axis=0))
    own_scores = nodes("Reshape", scores, nodes("Concat", groups, [1], each, axis=0))
    chosen = _chosen(nodes, own_boxes, own_scores, config)
    shape = nodes("Concat", groups, each, axis=0)
    own = nodes("Reshape", scores, shape)
    kept = nodes("Mul", own, _marked(nodes, own, nodes("Gather", chosen, [0, 2], axis=1)))
    return nodes("Reshape", kept, nodes("Shape", scores))


def _chosen(nodes: _Nodes, boxes: str, scores: str, config: PostprocessSettings) -> str:
    """``[S, 3]``: image, class and box that plain NMS leaves of each class, at most as many as the settings allow."""
    most = np.array([config.max_detections_per_class or np.iinfo(np.int64).max])
    limits = (most, np.array([config.nms_iou], np.float32), np.array([0], np.float32))
    return nodes("NonMaxSuppression", boxes, scores, *limits)


def _marked(nodes: _Nodes, like: str, index: str) -> str:
    """Zeros of the shape of ``like`` with ones at an index ``[S, 2]``."""
    ones = nodes("Expand", np.float32(1), nodes("Gather", nodes("Shape", index), [0]))
    return nodes("ScatterND", nodes("Mul", like, np.float32(0)), index, ones)
