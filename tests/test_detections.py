"""Columns of detections."""

from __future__ import annotations

import numpy as np
import pytest

from retinaflow.detections import Detections


def made(count: int, first: int = 0) -> Detections:
    rows = np.arange(first, first + count)
    return Detections(rows.astype(np.int32), (rows % 3).astype(np.int32), rows / 10, np.tile(rows[:, None] / 7, 4))


def rows_of(detections: Detections) -> list[tuple[float, ...]]:
    columns = zip(detections.image_index, detections.class_index, detections.score, detections.boxes[:, 0], strict=True)
    return [tuple(map(float, row)) for row in columns]


def test_no_detections_have_columns_of_length_0() -> None:
    for empty in (Detections.empty(), Detections.concatenate([]), made(3).take(np.zeros(3, bool))):
        assert len(empty) == 0
        assert empty.boxes.shape == (0, 4)
        assert empty.image_index.dtype == np.int32


def test_rows_are_taken_in_the_given_order_by_index_or_by_mask() -> None:
    assert rows_of(made(5).take(np.array([4, 0, 0]))) == [rows_of(made(5))[row] for row in (4, 0, 0)]
    assert rows_of(made(3).take(np.array([True, False, True]))) == [rows_of(made(3))[row] for row in (0, 2)]


def test_parts_are_joined_in_order() -> None:
    joined = Detections.concatenate([made(2), Detections.empty(), made(3, first=2)])
    assert rows_of(joined) == rows_of(made(5))


@pytest.mark.parametrize("column", ["image_index", "class_index", "score", "boxes"])
def test_columns_of_different_lengths_are_refused_with_their_shapes(column: str) -> None:
    columns = dict(vars(made(3)))
    columns[column] = columns[column][:2]
    with pytest.raises(ValueError, match=r"columns of one length and boxes \[D, 4\], but got image_index"):
        Detections(**columns)


def test_boxes_have_four_sides() -> None:
    with pytest.raises(ValueError, match=r"boxes \(3, 3\)"):
        Detections(np.zeros(3, np.int32), np.zeros(3, np.int32), np.zeros(3), np.zeros((3, 3)))
