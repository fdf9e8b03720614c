"""Pictures with boxes: colours by class, odd boxes, names that do not cover each other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinaflow.reports.box_images import DrawnBox, class_color, drawn, save_image, side_by_side

BLANK = np.zeros((120, 200, 3), dtype=np.uint8)


def _shows(picture: np.ndarray, class_id: str) -> int:
    return int((picture == np.array(class_color(class_id), dtype=np.uint8)).all(axis=2).sum())


def test_a_class_has_a_colour_of_its_own_that_is_seen_on_black() -> None:
    colors = {class_color(f"/m/{n}") for n in range(100)}
    assert len(colors) == 100
    assert min(max(color) for color in colors) >= 190
    assert class_color("/m/0car") == class_color("/m/0car")


def test_a_picture_is_the_image_with_its_box_below_a_line_of_text() -> None:
    box = DrawnBox((0.25, 0.5, 0.75, 1.0), "/m/0car", "Car", 0.876)
    assert box.text == "Car 0.88"
    picture = drawn(BLANK, [box], title="x")
    bar = picture.shape[0] - 120
    assert picture.shape[1:] == (200, 3)
    # 0.25 of 199 pixels, and the row halfway between the box's sides.
    assert tuple(picture[bar + 90, 50]) == class_color("/m/0car")
    assert not picture[bar + 90, 100].any()
    assert (picture[:2] == 255).all()


@pytest.mark.parametrize(
    "box", [(0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 0.1, 0.1), (-1.0, -1.0, 2.0, 2.0), (0.99, 0.0, 1.0, 0.01)], ids=str
)
def test_an_odd_box_is_drawn_inside_the_image(box: tuple[float, float, float, float]) -> None:
    picture = drawn(BLANK, [DrawnBox(box, "/m/0car", "A name that is longer than the image is wide", 1.0)], title="x")
    assert picture.shape[1] == 200
    assert _shows(picture, "/m/0car") > 0


def test_names_of_boxes_at_one_place_stand_beside_each_other() -> None:
    place = (0.3, 0.3, 0.7, 0.7)
    alone = _shows(drawn(BLANK, [DrawnBox(place, "/m/0car", "Car", 0.9)], title=""), "/m/0car")
    both = drawn(BLANK, [DrawnBox(place, "/m/0car", "Car", 0.9), DrawnBox(place, "/m/0bus", "Bus", 0.8)], title="")
    # The better one is on top; the other's name may cover a little of its line, and none of its name.
    assert 0.9 * alone < _shows(both, "/m/0car") <= alone
    assert _shows(both, "/m/0bus") > 100


def test_pictures_are_put_in_a_row_and_written(tmp_path: Path) -> None:
    row = side_by_side([BLANK, BLANK])
    assert row.shape == (120, 408, 3)
    save_image(row, tmp_path / "new" / "row.png")
    with Image.open(tmp_path / "new" / "row.png") as image:
        assert image.size == (408, 120)
    os.link(tmp_path / "new" / "row.png", tmp_path / "unsent.png")
    before = (tmp_path / "unsent.png").read_bytes()
    save_image(BLANK, tmp_path / "new" / "row.png")
    assert (tmp_path / "unsent.png").read_bytes() == before, "what waits for MLflow is a link to it"
