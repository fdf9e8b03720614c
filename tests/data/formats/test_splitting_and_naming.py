"""Validation images out of a training split; ids out of names; boxes rotated as EXIF requires."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retinaflow.data.formats.ids import class_ids, image_ids
from retinaflow.data.formats.orientation import to_rotated, to_stored
from retinaflow.data.formats.splits import one_sided, validation_images


def long_tailed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """300 images with one to three of 12 classes, class k on about 150 / (k + 1)^1.5 of them."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(12) + 1.0) ** -1.5
    image = np.repeat(np.arange(300), rng.integers(1, 4, 300))
    return image, rng.choice(12, len(image), p=weight / weight.sum())


@pytest.mark.parametrize("seed", range(5))
def test_every_class_on_two_or_more_images_is_on_both_sides(seed: int) -> None:
    image, classes = long_tailed(seed)
    chosen = validation_images(image, classes, 320, fraction=0.2, seed=seed)
    assert one_sided(image, classes, chosen) == []
    assert 0.15 * 320 <= chosen.sum() <= 0.25 * 320
    # Images without boxes are shared out too.
    assert chosen[300:].sum() == 4


def test_a_class_on_one_image_is_trained_on_and_the_seed_decides_the_rest() -> None:
    image, classes = np.arange(50), np.r_[1, np.zeros(49, dtype=int)]
    first, again, other = (validation_images(image, classes, 50, fraction=0.2, seed=seed) for seed in (0, 0, 1))
    assert not first[0]
    assert (first == again).all()
    assert (first != other).any()


def test_a_triangle_of_classes_cannot_be_parted_and_is_told() -> None:
    image, classes = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 2, 0, 1, 1, 2])
    assert len(one_sided(image, classes, validation_images(image, classes, 3, fraction=0.5, seed=0))) == 1


@given(st.lists(st.sampled_from(["a.jpg", "a.png", "x/a.jpg", "y/a.jpg", "x/y/a.jpg", "x__a.jpg", "b,c.jpg", ".jpg"])))
@settings(deadline=None, max_examples=60)
def test_ids_of_images_are_unique_plain_names(names: list[str]) -> None:
    ids = image_ids(names)
    assert len(set(ids)) == len(ids) == len(names)
    assert not [image_id for image_id in ids if set('/\\:,"') & set(image_id)]


def test_ids_of_classes_are_made_of_names_and_given_ones_are_kept() -> None:
    assert class_ids(["Traffic light", "traffic-light", "犬", "!"]) == [
        "/c/traffic_light", "/c/traffic_light_2", "/c/犬", "/c/class",
    ]  # fmt: skip
    assert class_ids(["Cat", "Dog"], ["/m/01yrx", None]) == ["/m/01yrx", "/c/dog"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_rotate_as_pillow_rotates_the_image(orientation: int) -> None:
    stored = np.zeros((20, 30, 3), dtype=np.uint8)
    stored[4:10, 3:9] = 255  # x 3 to 9 of 30, y 4 to 10 of 20
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(stored)
    image.getexif()[274] = orientation
    shown = np.asarray(ImageOps.exif_transpose(image))[..., 0] > 0
    down, across = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    height, width = shown.shape
    turned = np.array([[across[0] / width, down[0] / height, (across[-1] + 1) / width, (down[-1] + 1) / height]])
    box = np.array([[3 / 30, 4 / 20, 9 / 30, 10 / 20]])
    np.testing.assert_allclose(to_stored(turned, orientation), box)
    np.testing.assert_allclose(to_rotated(box, orientation), turned)
