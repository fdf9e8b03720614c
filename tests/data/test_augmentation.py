"""Augmentation: how strong, and that boxes, their rows and the pixels stay together."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from made_index import presence_of
from numpy.typing import NDArray

from retinaflow.data.augmentation import MIN_VISIBLE, Augmentation
from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.transforms import pipeline

SHAPE = (96, 160)  # (height, width), not square on purpose
RED, BLUE = (230, 20, 20), (20, 20, 230)
# Two boxes, normalised xyxy: red in the upper left quarter, blue in the lower right one.
BOXES = np.array([[0.125, 0.125, 0.4375, 0.4375], [0.5625, 0.5625, 0.875, 0.9375]])
LABELS = np.array([0, 1])
STRONG = Augmentation(np.array([1.0, 1.0]), base=1.0)
# Strength 0.004 is rounded to 0: only the flip is left.
FLIP_ONLY = Augmentation(np.array([0.004, 0.004]), base=0.004)


def scene() -> NDArray[np.uint8]:
    image = np.full((*SHAPE, 3), 90, dtype=np.uint8)
    for box, colour in zip(BOXES, (RED, BLUE), strict=True):
        x1, y1, x2, y2 = (box * [SHAPE[1], SHAPE[0], SHAPE[1], SHAPE[0]]).astype(int)
        image[y1:y2, x1:x2] = colour
    return image


def test_strength_zero_is_the_identity() -> None:
    off = Augmentation(np.zeros(2), base=0.0)
    for seed in range(5):
        image, boxes, kept = off.apply(scene(), BOXES, labels=LABELS, seed=seed)
        np.testing.assert_array_equal(image, scene())
        np.testing.assert_array_equal(boxes, BOXES)
        assert kept.tolist() == [0, 1]


def test_strength_goes_by_the_rarest_bin_from_rare_to_base() -> None:
    # Bins (1) (10) (100), class 3 without an image: rarity 1, 1/2, 0, 0; s = 0.2 + (0.8 - 0.2) x rarity.
    bins = make_bins(presence_of([1, 10, 100, 0]), num_bins=3)
    made = Augmentation.by_rarity(bins, base=0.2, rare=0.8, balance=1.0)
    np.testing.assert_allclose(made.strength_of_class, [0.8, 0.5, 0.2, 0.2])
    assert made.strength(np.array([2, 1, 2])) == pytest.approx(0.5)
    assert made.strength(np.array([2, 0, 1])) == pytest.approx(0.8)
    assert made.strength(np.array([], dtype=np.int32)) == 0.2
    assert made.strength(np.array([2, 0, 1]), by_class=False) == 0.2, "before rare classes are drawn more often"
    assert Augmentation.by_rarity(bins, base=0.8, rare=0.2, balance=1.0).strength(np.array([2, 0])) == pytest.approx(
        0.2
    ), "rare classes may be changed less, too"


def test_a_flip_mirrors_the_pixels_and_the_boxes_and_happens_to_half_of_the_images() -> None:
    flipped = 0
    mirrored = np.stack([1 - BOXES[:, 2], BOXES[:, 1], 1 - BOXES[:, 0], BOXES[:, 3]], axis=1)
    for seed in range(60):
        image, boxes, kept = FLIP_ONLY.apply(scene(), BOXES, labels=LABELS, seed=seed)
        assert kept.tolist() == [0, 1]
        is_flipped = not np.array_equal(image, scene())
        flipped += is_flipped
        np.testing.assert_array_equal(image, scene()[:, ::-1] if is_flipped else scene())
        np.testing.assert_allclose(boxes, mirrored if is_flipped else BOXES, atol=1e-6)
    # Binomial(60, 1/2): 30 with a standard deviation of 3.9.
    assert 15 <= flipped <= 45


def test_flips_alone_change_nothing_else() -> None:
    flips = Augmentation(np.zeros(2), base=0.0, horizontal_flip=True)
    mirrored = np.stack([1 - BOXES[:, 2], BOXES[:, 1], 1 - BOXES[:, 0], BOXES[:, 3]], axis=1)
    count = 0
    for seed in range(60):
        image, boxes, kept = flips.apply(scene(), BOXES, labels=LABELS, seed=seed)
        is_flipped = not np.array_equal(image, scene())
        count += is_flipped
        np.testing.assert_array_equal(image, scene()[:, ::-1] if is_flipped else scene())
        np.testing.assert_array_equal(boxes, mirrored if is_flipped else BOXES)
        assert kept.tolist() == [0, 1]
        assert image.flags.c_contiguous
    assert 15 <= count <= 45
    assert len(flips.apply(scene(), BOXES[:0], labels=LABELS[:0], seed=1)[1]) == 0


def test_without_augmentation_a_vertical_flip_turns_half_of_the_images() -> None:
    flips = Augmentation(np.zeros(2), base=0.0, vertical_flip=True)
    turned = np.stack([BOXES[:, 0], 1 - BOXES[:, 3], BOXES[:, 2], 1 - BOXES[:, 1]], axis=1)
    count = 0
    for seed in range(60):
        image, boxes, _ = flips.apply(scene(), BOXES, labels=LABELS, seed=seed)
        is_flipped = not np.array_equal(image, scene())
        count += is_flipped
        np.testing.assert_array_equal(image, scene()[::-1] if is_flipped else scene())
        np.testing.assert_array_equal(boxes, turned if is_flipped else BOXES)
    assert 15 <= count <= 45


def test_holes_move_no_box_and_drop_those_that_they_hide() -> None:
    grid = np.arange(0, 1, 0.05)
    corners = np.array([[x + 0.013, y + 0.017, x + 0.041, y + 0.044] for x in grid for y in grid])
    with_holes, without = (pipeline.__wrapped__(1.0, False, MIN_VISIBLE) for _ in range(2))
    without.transforms[-1].p = 0.0
    hidden = 0
    for seed in range(40):
        results = []
        for transforms in (with_holes, without):
            transforms.set_random_seed(seed)
            results.append(
                transforms(image=np.full((*SHAPE, 3), 90, np.uint8), bboxes=corners, rows=np.arange(len(corners)))
            )
        holed, whole = results
        kept = np.isin(whole["rows"], holed["rows"])
        np.testing.assert_array_equal(holed["bboxes"], np.asarray(whole["bboxes"])[kept])
        # A box is dropped where most of its pixels are black, which only holes are.
        for x1, y1, x2, y2 in np.asarray(whole["bboxes"])[~kept] * [SHAPE[1], SHAPE[0], SHAPE[1], SHAPE[0]]:
            pixels = holed["image"][int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
            assert (pixels == 0).all(axis=2).mean() > 1 - MIN_VISIBLE
            hidden += 1
    assert hidden > 20


def test_a_vertical_flip_turns_the_boxes_upside_down_and_only_happens_if_asked_for() -> None:
    upside_down = Augmentation(np.full(2, 0.004), base=0.004, vertical_flip=True)
    below = [
        np.allclose(upside_down.apply(scene(), BOXES, labels=LABELS, seed=seed)[1][:, 1], 1 - BOXES[:, 3], atol=1e-6)
        for seed in range(40)
    ]
    assert 8 <= sum(below) <= 32


def test_boxes_their_rows_and_the_pixels_stay_together() -> None:
    seen = 0
    for seed in range(60):
        image, boxes, kept = STRONG.apply(scene(), BOXES, labels=LABELS, seed=seed)
        assert image.shape == (*SHAPE, 3)
        assert image.dtype == np.uint8
        assert len(boxes) == len(kept)
        for (x1, y1, x2, y2), row in zip(boxes, kept, strict=True):
            assert 0 <= x1 < x2 <= 1
            assert 0 <= y1 < y2 <= 1
            # The middle of a box shows its colour, whatever geometry and colour changes did to it: the median over the
            # middle third, as holes and noise may cover some pixels.
            x = slice(int((2 * x1 + x2) / 3 * SHAPE[1]), int((x1 + 2 * x2) / 3 * SHAPE[1]) + 1)
            y = slice(int((2 * y1 + y2) / 3 * SHAPE[0]), int((y1 + 2 * y2) / 3 * SHAPE[0]) + 1)
            red, _, blue = np.median(image[y, x].reshape(-1, 3), axis=0)
            if red != blue:  # a hole covers the middle
                assert (red > blue) == (row == 0), seed
                seen += 1
    assert seen > 70


def test_a_box_that_leaves_the_view_is_dropped_with_its_row() -> None:
    corner = np.array([[0.0, 0.0, 0.06, 0.06], [0.3, 0.3, 0.7, 0.7], [0.95, 0.95, 1.0, 1.0]])
    lost = set()
    for seed in range(60):
        _, boxes, kept = STRONG.apply(scene(), corner, labels=np.array([0, 1, 1]), seed=seed)
        assert len(boxes) == len(kept)
        assert kept.tolist() == sorted(kept.tolist())
        lost |= {0, 1, 2} - set(kept.tolist())
    assert lost >= {0, 2}


@pytest.mark.parametrize(
    "boxes",
    [[], [[0.0, 0.0, 1.0, 1.0]], [[0.5, 0.1, 0.5 + 1e-9, 0.9]], [[0.2, 0.2, 0.6, 0.6]] * 200],
    ids=["none", "all of the image", "a hair's breadth", "many"],
)
def test_any_boxes_can_be_augmented(boxes: list[list[float]]) -> None:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    for seed in range(15):
        image, found, kept = STRONG.apply(scene(), array, labels=np.zeros(len(array), np.int32), seed=seed)
        assert image.shape == (*SHAPE, 3)
        assert found.shape == (len(kept), 4)
        assert len(kept) <= len(array)


def test_the_same_seed_gives_the_same_pixels_and_no_global_state_is_read_or_moved() -> None:
    first = STRONG.apply(scene(), BOXES, labels=LABELS, seed=11)
    STRONG.apply(scene(), BOXES, labels=LABELS, seed=12)
    np.random.seed(3)  # noqa: NPY002  (the point of the test)
    random.seed(3)
    torch.manual_seed(3)
    states = str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    again = STRONG.apply(scene(), BOXES, labels=LABELS, seed=11)
    assert (str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()) == states  # noqa: NPY002
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_seeds_give_other_pixels() -> None:
    images = {STRONG.apply(scene(), BOXES, labels=LABELS, seed=seed)[0].tobytes() for seed in range(20)}
    assert len(images) >= 18, "one image in a hundred is left as it is"


def test_more_strength_changes_the_image_more() -> None:
    def change(strength: float) -> float:
        made = Augmentation(np.full(2, strength), base=strength)
        found = [made.apply(scene(), BOXES, labels=LABELS, seed=seed)[1] for seed in range(60)]
        sides = [
            np.abs(boxes[:, 2:] - boxes[:, :2] - (BOXES[:, 2:] - BOXES[:, :2])).mean()
            for boxes in found
            if len(boxes) == 2
        ]
        return float(np.mean(sides))

    assert change(0.1) < change(0.5) < change(1.0)


def test_the_input_is_left_alone() -> None:
    image, boxes = scene(), BOXES.copy()
    for seed in range(10):
        STRONG.apply(image, boxes, labels=LABELS, seed=seed)
    np.testing.assert_array_equal(image, scene())
    np.testing.assert_array_equal(boxes, BOXES)
