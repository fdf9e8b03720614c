"""What ``convert`` writes, every reader reads: random sets into each layout and back, and nothing lost in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from retinaflow.data.formats.conversion import convert
from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.known_formats import layout_of
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import ConvertConfig, Layout
from retinaflow.settings.resolve import resolve

SIZES = ((640, 480, 1), (37, 53, 6), (3, 200, 3))
"""(width, height, EXIF orientation) of the images."""
LOST: dict[Layout, tuple[str, ...]] = {
    "openimages": (),
    "coco": (),
    "voc": ("depiction", "inside"),
    "yolo": tuple(FLAGS),
}
TOLERANCE: dict[Layout, float] = {"openimages": 1e-9, "coco": 1e-6, "yolo": 2e-8, "voc": 1.0}
"""Largest difference of an edge after writing: a fraction of the image, for VOC and COCO pixels."""

side = st.one_of(
    st.floats(-20, 700, allow_nan=False),
    st.integers(0, 640).map(float),
    st.sampled_from([0.0, 1e-13, 5e-7, 0.5, 640.0, 479.9999999, 36.99999999]),
)
length = st.one_of(
    st.floats(0, 300, allow_nan=False), st.sampled_from([0.0, 5.7e-14, 1e-7, 4e-7, 6e-7, 1e-3, 0.4999, 0.5, 1.0, 640.0])
)
box = st.tuples(
    st.integers(0, len(SIZES) - 1), st.integers(0, 2), side, side, length, length, st.integers(0, 2 ** len(FLAGS) - 1)
)


def run(data: Path, folder: Path, to: Layout, **given: Any) -> tuple[DetectionSet, RowErrors]:
    folder.mkdir(parents=True)
    fixed = {"data": str(data), "validation_fraction": 0, "box_unit": "auto", "coco_bbox": "size"}
    config = resolve(ConvertConfig, {**fixed, **given})
    return convert(config, data, folder, layout=layout_of(data), target=to)


def write(folder: Path, boxes: list[tuple[Any, ...]], *, federated: bool) -> Path:
    """A COCO set of the images in ``folder``, with some boxes given twice."""
    images = [
        {"id": n, "file_name": f"{n}.jpg", "width": width, "height": height}
        for n, (width, height, _) in enumerate(SIZES)
    ]
    if federated:
        images = [{**image, "neg_category_ids": [2]} for image in images]
    annotations = [
        {
            "id": n,
            "image_id": image,
            "category_id": category,
            "bbox": [x, y, width, height],
            "iscrowd": flags >> FLAGS.index("group_of") & 1,
            "attributes": {name: bool(flags >> bit & 1) for bit, name in enumerate(FLAGS) if name != "group_of"},
        }
        for n, (image, category, x, y, width, height, flags) in enumerate(boxes)
    ]
    document = {
        "info": {"description": "written by retinaflow"},  # boxes are pixels, however small
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(("cup", "Cup", "1, 2"))],
    }
    (folder / "train.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for n, (width, height, orientation) in enumerate(SIZES):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (width, height), (90, 120, 90)).save(folder / f"{n}.jpg", exif=exif)
    return folder


def rows_of(found: DetectionSet) -> np.ndarray:
    """Image, class, corners in pixels and flags of each box, in a fixed order."""
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    ids = found.images["image_id"].to_numpy()[image].astype(np.int64)
    names = np.array(found.taxonomy.names)[found.boxes["class"].to_numpy(dtype=np.int64)]
    number = np.array([("cup", "Cup", "1, 2").index(name) for name in names.tolist()], dtype=np.int64)
    sizes = found.images[["width", "height", "width", "height"]].to_numpy(dtype=np.float64)[image]
    flags = found.boxes[list(FLAGS)].to_numpy(dtype=np.float64)
    rows = np.column_stack([ids, number, found.corners * sizes, flags]).reshape(-1, 6 + len(FLAGS))
    return rows[np.lexsort(np.round(rows[:, 5::-1], 0).T)]


@pytest.mark.parametrize("to", ["openimages", "coco", "yolo", "voc"])
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(boxes=st.lists(box, max_size=12), federated=st.booleans(), repeat=st.booleans())
def test_what_is_written_is_read_and_every_box_is_written_or_reported(
    photographs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    to: Layout,
    boxes: list[Any],
    federated: bool,
    repeat: bool,
) -> None:
    boxes = boxes + boxes[: 3 * repeat]
    top = tmp_path_factory.mktemp("sets")
    data = write(photographs, boxes, federated=federated)
    found, errors = run(data, top / "there", to, on_bad_row="drop", orientation="stored")
    assert len(found.boxes) + len(errors.found) == len(boxes)
    if not len(found.boxes):
        return
    # Reading stops at the first row that breaks a rule.
    back, _ = run(top / "there", top / "back", "openimages", exhaustive=str(found.exhaustive))
    assert len(back.boxes) == len(found.boxes)
    again, lost = run(top / "back", top / "again", "coco", on_bad_row="drop")
    assert len(again.boxes) + len(lost.found) == len(found.boxes)
    wanted, got = rows_of(found), rows_of(back)
    assert (got[:, :2] == wanted[:, :2]).all()
    scale = 1 if to in ("voc", "coco") else 640
    # Reading is followed by writing in the published layout, which rounds too.
    assert np.abs(_nearest(got, wanted)[:, 2:6] - wanted[:, 2:6]).max(initial=0) <= TOLERANCE[to] * scale + 1e-6
    kept = [6 + bit for bit, name in enumerate(FLAGS) if name not in LOST[to]]
    assert got[:, kept].sum() == wanted[:, kept].sum()


def _nearest(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted row the row of the same image and class with the nearest corners."""
    chosen = []
    for row in wanted:
        own = got[(got[:, :2] == row[:2]).all(axis=1)]
        chosen.append(own[np.abs(own[:, 2:6] - row[2:6]).max(axis=1).argmin()])
    return np.array(chosen).reshape(-1, wanted.shape[1])


SAME: dict[Layout, Callable[[float], float]] = {
    "openimages": lambda width: 4e-10 * width,
    "coco": lambda width: 4e-7,
    "yolo": lambda width: 4e-9 * width,
    "voc": lambda width: 0.4,
}
"""A distance below which two numbers are written alike in an image of a width."""


@pytest.mark.parametrize("to", SAME)
def test_two_boxes_that_are_written_alike_are_one_and_the_other_is_reported(
    photographs: Path, tmp_path: Path, to: Layout
) -> None:
    near = SAME[to](640)
    data = write(photographs, [(0, 0, 100, 100, 50, 50, 0), (0, 0, 100 + near, 100, 50, 50, 0)], federated=False)
    with pytest.raises(ValueError, match=r"annotation 2: a box must be given once, also as it is written \(\w+\)"):
        run(data, tmp_path / "stopped", to)
    found, errors = run(data, tmp_path / "there", to, on_bad_row="drop")
    assert (len(found.boxes), len(errors.found)) == (1, 1)
