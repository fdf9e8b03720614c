"""Copy-paste: where a crop comes from and lands, what is learned from it, and that the expected counts are met."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_index import make_index, make_taxonomy
from numpy.typing import NDArray

from retinaflow.boxes import ioa
from retinaflow.data import copy_paste as rules
from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import PlannedBatch
from retinaflow.data.copy_paste import CopyPaste, Paste, soft_edge
from retinaflow.data.dataset import BatchLoader, DetectionDataset, Request, Sample
from retinaflow.data.exposure import exposure_table, measure_exposure, measure_pastes
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.images import attach_files
from retinaflow.data.index import FLAGS, AnnotationIndex, row_starts
from retinaflow.data.sampling import seed_of_position
from retinaflow.errors import DataError
from retinaflow.taxonomy import Hierarchy, Taxonomy

SHAPE = (96, 128)
GREY = 120
COLOURS = ((240, 20, 20), (20, 200, 20), (20, 20, 240), (200, 200, 20))

Rows = list[tuple[int, tuple[float, float, float, float]]]


def photos(
    folder: Path,
    boxed: list[Rows],
    *,
    classes: int,
    links: tuple[tuple[int, int], ...] = (),
    size: tuple[int, int] = SHAPE,
    flags: dict[int, str] | None = None,
    labelled: list[list[tuple[int, bool]]] | None = None,
) -> AnnotationIndex:
    """Grey images in which each box is filled with the colour of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(boxed):
        pixels = np.full((*size, 3), GREY, dtype=np.uint8)
        for label, box in rows:
            x1, y1, x2, y2 = np.rint(np.array(box) * np.tile(size[::-1], 2)).astype(int)
            pixels[y1:y2, x1:x2] = COLOURS[label]
        assert cv2.imwrite(str(folder / f"i{number:04d}.png"), pixels[:, :, ::-1])
    index = make_index(
        [[label for label, _ in rows] for rows in boxed], classes=classes, links=links, labelled=labelled
    )
    bits = np.zeros(len(index.boxes), dtype=np.uint8)
    for row, flag in (flags or {}).items():
        bits[row] = 1 << FLAGS.index(flag)
    boxes = np.array([box for rows in boxed for _, box in rows]).reshape(-1, 4)
    return attach_files(replace(index, boxes=boxes, flags=bits), [folder])[0]


MIDDLE = (0.3, 0.3, 0.7, 0.7)
CORNER = (0.0, 0.0, 0.25, 0.25)


def frequent_and_rare(folder: Path) -> AnnotationIndex:
    """Class 0 in a corner of images 0 to 7, class 1 in the middle of image 8."""
    return photos(folder, [*([(0, CORNER)] for _ in range(8)), [(1, MIDDLE)]], classes=2)


def pasting(index: AnnotationIndex, *, probability: float = 1.0, num_bins: int = 2) -> CopyPaste:
    made = CopyPaste.by_rarity(index, bins_of(index, num_bins), probability=probability, balance=1.0)
    assert made is not None
    return made


def bins_of(index: AnnotationIndex, num_bins: int = 2) -> ClassBins:
    return make_bins(image_class_pairs(index), num_bins=num_bins)


def chosen(pasting: CopyPaste, image: int, seed: int, shape: tuple[int, int] = SHAPE) -> Paste:
    paste = pasting.choose(image, shape, seed=seed)
    assert paste is not None
    return paste


def sample_of(dataset: DetectionDataset, image: int, seed: int | None, *, by_class: bool = True) -> Sample:
    sample = dataset[Request(image, SHAPE, seed, by_class)]
    assert isinstance(sample, Sample)
    return sample


# Which boxes, how often


def test_classes_are_pasted_by_rarity_then_images_then_boxes_are_alike(tmp_path: Path) -> None:
    # Images per class 1, 2 and 4, a bin each: rarity 1, 1/2 and 0 (balance 1), so q = 2/3, 1/3 and 0.
    boxed: list[Rows] = [[(0, MIDDLE)], [(1, CORNER), (1, MIDDLE)], [(1, MIDDLE)], *([(2, MIDDLE)] for _ in range(4))]
    made = pasting(photos(tmp_path, boxed, classes=3), num_bins=3)
    assert made.rows.tolist() == [0, 1, 2, 3]
    # Class 1: 1/6 for each of its images; in the first one 1/12 for each of two boxes.
    np.testing.assert_allclose(made.chance, [2 / 3, 1 / 12, 1 / 12, 1 / 6])


def test_group_of_inside_and_tiny_boxes_are_not_cropped_and_truncated_ones_are(tmp_path: Path) -> None:
    tiny = (0.5, 0.5, 0.5 + 7 / 128, 0.9)
    boxed: list[Rows] = [[(0, MIDDLE), (0, CORNER), (0, MIDDLE), (0, tiny)], *([(1, MIDDLE)] for _ in range(9))]
    flags = {0: "IsGroupOf", 1: "IsInside", 2: "IsTruncated"}
    made = pasting(photos(tmp_path, boxed, classes=2, flags=flags))
    assert made.rows.tolist() == [2]
    assert made.chance.tolist() == [1]


def test_nothing_is_pasted_without_probability_without_rarity_and_without_a_box_to_crop(tmp_path: Path) -> None:
    index = frequent_and_rare(tmp_path)
    bins = bins_of(index)
    assert CopyPaste.by_rarity(index, bins, probability=0.0, balance=1.0) is None
    assert CopyPaste.by_rarity(index, bins_of(index, 1), probability=1.0, balance=1.0) is None
    groups = replace(index, flags=np.full(9, 1 << FLAGS.index("IsGroupOf"), dtype=np.uint8))
    assert CopyPaste.by_rarity(groups, bins, probability=1.0, balance=1.0) is None


def test_the_probability_is_the_fraction_of_images_with_a_crop(tmp_path: Path) -> None:
    made = pasting(frequent_and_rare(tmp_path), probability=0.3)
    pasted = sum(made.choose(0, SHAPE, seed=seed) is not None for seed in range(1000))
    # Binomial(1000, 0.3): 300 with a standard deviation of 14.5.
    assert 250 <= pasted <= 350


# Geometry


def test_a_crop_has_context_keeps_its_aspect_and_lies_in_the_image(tmp_path: Path) -> None:
    made = pasting(frequent_and_rare(tmp_path))
    zooms = []
    for seed in range(200):
        paste = chosen(made, 0, seed)
        # 0.4 of the sides, and a tenth of that on each side.
        np.testing.assert_allclose(paste.crop, [0.26, 0.26, 0.74, 0.74])
        x1, y1, x2, y2 = paste.region
        assert 0 <= x1 < x2 <= 128
        assert 0 <= y1 < y2 <= 96
        # The stored crop has 61.44 x 46.08 pixels; sides are whole pixels.
        assert abs((x2 - x1) / 61.44 - (y2 - y1) / 46.08) < 1.01 / 46.08
        zooms.append((x2 - x1) / 61.44)
        (box,) = paste.boxes * [128, 96, 128, 96]
        # The box is the middle 1 / 1.2 of the crop.
        np.testing.assert_allclose((box[:2] + box[2:]) / 2, [(x1 + x2) / 2, (y1 + y2) / 2])
        np.testing.assert_allclose(box[2:] - box[:2], [(x2 - x1) / 1.2, (y2 - y1) / 1.2])
    # At most 0.65 of a side of the image, where the crop has 0.48; down to 1 / 2.5 of that.
    assert max(zooms) == pytest.approx(0.65 / 0.48, rel=0.04)
    assert min(zooms) == pytest.approx(0.65 / 0.48 / 2.5, rel=0.04)


@pytest.mark.parametrize("source", [(96, 128), (300, 100), (40, 400)], ids=["alike", "tall", "wide"])
def test_an_object_that_fills_its_image_leaves_room_around_it(tmp_path: Path, source: tuple[int, int]) -> None:
    boxed: list[Rows] = [[(1, (0.0, 0.0, 1.0, 1.0))], *([(0, MIDDLE)] for _ in range(8))]
    index = photos(tmp_path, boxed, classes=2, size=source)
    made = pasting(index)
    for seed in range(50):
        paste = chosen(made, 3, seed)
        sides = (paste.region[2:] - paste.region[:2]) / np.array([128, 96])
        assert sides.max() <= rules.MAX_SIDE + 1 / 96
        assert sides.max() >= rules.MAX_SIDE / rules.ZOOM_RANGE - 1 / 96


def test_small_objects_are_not_made_smaller_than_a_detector_can_see(tmp_path: Path) -> None:
    boxed: list[Rows] = [[(1, (0.5, 0.5, 0.6, 0.6))], *([(0, MIDDLE)] for _ in range(8))]
    made = pasting(photos(tmp_path, boxed, classes=2))
    heights = [chosen(made, 3, seed).region[3] - chosen(made, 3, seed).region[1] for seed in range(60)]
    # 0.12 x 96 = 11.5 pixels at zoom 1.
    assert min(heights) >= 11
    assert max(heights) <= round(11.52 * rules.MAX_ZOOM)


def test_a_paste_avoids_the_boxes_that_are_there(tmp_path: Path) -> None:
    boxed: list[Rows] = [[(1, (0.0, 0.0, 0.3, 0.3))], *([(0, (0.0, 0.0, 0.3, 0.3))] for _ in range(8))]
    made = pasting(photos(tmp_path, boxed, classes=2))
    cover = [
        ioa(made.index.boxes[3:4], chosen(made, 3, seed).region[None] / [128, 96, 128, 96])[0, 0] for seed in range(99)
    ]
    assert np.mean(np.array(cover) == 0) > 0.9


def test_boxes_that_are_covered_by_more_than_half_are_dropped_and_group_of_boxes_stay(tmp_path: Path) -> None:
    grid: Rows = [(0, (x / 10, y / 10, x / 10 + 0.08, y / 10 + 0.08)) for x in range(10) for y in range(10)]
    boxed = [[(1, MIDDLE)], grid, *([(0, MIDDLE)] for _ in range(7))]
    index = photos(tmp_path, boxed, classes=2, flags={1 + n: "IsGroupOf" for n in range(0, 100, 2)})
    index = replace(index, all_known=True)
    made, lost = pasting(index), 0
    for seed in range(20):
        paste = chosen(made, 1, seed)
        cover = ioa(index.boxes[1:101], paste.region[None] / [128, 96, 128, 96])[:, 0]
        is_group_of = np.arange(100) % 2 == 0
        assert paste.covered.tolist() == ((cover > 0.5) & ~is_group_of).tolist()
        sample = sample_of(DetectionDataset(index, copy_paste=made), 1, seed)
        assert (sample.labels == 0).sum() == 100 - paste.covered.sum()
        assert sample.is_group_of.sum() == 50
        lost += paste.covered.sum()
    assert lost > 20


def test_boxes_in_the_crop_come_along_and_those_at_its_rim_do_not(tmp_path: Path) -> None:
    # The crop of row 0 is 0.26 to 0.74. Row 1 lies in it, row 2 has half of its area in it, row 3 a sixth, row 4 none;
    # row 5 is a group-of box with a twentieth.
    boxes = [MIDDLE, (0.4, 0.4, 0.5, 0.5), (0.24, 0.3, 0.28, 0.5), (0.16, 0.3, 0.28, 0.5), CORNER, (0.7, 0.3, 1.5, 0.7)]
    rows: Rows = [(label, box) for label, box in zip((1, 0, 0, 0, 0, 0), boxes, strict=True)]
    index = photos(tmp_path, [rows, *([(0, CORNER)] for _ in range(8))], classes=2, flags={5: "IsGroupOf"})
    made = pasting(index)
    for seed in range(20):
        paste = chosen(made, 4, seed)
        assert paste.rows.tolist() == [0, 1, 2, 5]
        own = paste.boxes * [128, 96, 128, 96]
        x1, y1, x2, y2 = paste.region
        assert (own[:, :2] >= [x1 - 1e-9, y1 - 1e-9]).all()
        assert (own[:, 2:] <= [x2 + 1e-9, y2 + 1e-9]).all()
        # Row 1: 0.14 to 0.24 of the 0.48 of the crop, from the right when flipped.
        left = 1 - 0.24 / 0.48 if paste.flip else 0.14 / 0.48
        np.testing.assert_allclose(own[1, [0, 1]], [x1 + left * (x2 - x1), y1 + 0.14 / 0.48 * (y2 - y1)])
        # Row 2 is clipped to the crop, 0.26 to 0.28.
        np.testing.assert_allclose((own[2, 2] - own[2, 0]) / (x2 - x1), 0.02 / 0.48)
    sample = sample_of(DetectionDataset(index, copy_paste=made), 4, 0)
    assert sample.labels.tolist() == [0, 1, 0, 0, 0] or sample.labels.tolist() == [1, 0, 0, 0]
    assert sample.is_group_of[-1]


# Pixels


def test_the_pixels_of_the_crop_are_in_its_box_flipped_as_the_boxes_are_and_nothing_else_changes(
    tmp_path: Path,
) -> None:
    # Left half of the object red, right half green: a box of each half.
    halves: Rows = [(0, (0.3, 0.3, 0.5, 0.7)), (1, (0.5, 0.3, 0.7, 0.7))]
    index = photos(tmp_path, [halves, *([(1, CORNER)] for _ in range(8))], classes=2)
    dataset = DetectionDataset(index, copy_paste=pasting(index))
    plain = DetectionDataset(index)
    assert dataset.copy_paste is not None
    flips = 0
    for seed in range(30):
        paste, sample = chosen(dataset.copy_paste, 3, seed), sample_of(dataset, 3, seed)
        flips += paste.flip
        x1, y1, x2, y2 = paste.region
        outside = np.ones(SHAPE, dtype=bool)
        outside[y1:y2, x1:x2] = False
        before = sample_of(plain, 3, seed)
        np.testing.assert_array_equal(sample.image[outside], before.image[outside])
        for box, label in zip(sample.boxes[-len(paste.rows) :], sample.labels[-len(paste.rows) :], strict=True):
            x, y = (box[:2] + box[2:]) / 2
            colour = np.array(sample.image[int(y), int(x)], dtype=int)
            np.testing.assert_allclose(colour, COLOURS[label], atol=12)
    assert 5 <= flips <= 25


def test_the_edge_is_soft_on_all_sides_and_the_box_is_whole() -> None:
    weight = soft_edge((96, 128))
    assert weight.shape == (96, 128)
    np.testing.assert_allclose(weight, weight[::-1, ::-1], atol=1e-5)
    assert weight[0].max() < 0.05
    assert weight[:, 0].max() < 0.05
    # The middle of the sides of the box, at 1 / 1.2 of the crop.
    assert weight[48, round(64 + 64 / 1.2) - 1] > 0.98
    assert weight[48, 64] == 1
    assert (np.diff(weight[48, :64]) >= 0).all()


@pytest.mark.parametrize("shape", [(2, 2), (2, 90), (7, 3)])
def test_small_crops_have_an_edge_too(shape: tuple[int, int]) -> None:
    weight = soft_edge(shape)
    assert weight.shape == shape
    assert np.isfinite(weight).all()
    assert weight.max() > 0


# Labels


def test_the_pasted_class_becomes_known_its_ancestors_and_what_comes_along_do_not(tmp_path: Path) -> None:
    # Class 2 above the rare class 0; class 1 comes along; class 3 is absent on the image pasted into.
    rows: Rows = [(0, MIDDLE), (1, (0.4, 0.4, 0.5, 0.5))]
    labels: list[list[tuple[int, bool]]] = [[], *([(3, False)] for _ in range(8))]
    boxed: list[Rows] = [rows, *([(3, CORNER)] for _ in range(8))]
    index = photos(tmp_path, boxed, classes=4, links=((2, 0),), labelled=labels)
    index = replace(index, labels=np.array([0, 1] + [3] * 8, dtype=np.int32))
    made = pasting(index, num_bins=2)
    dataset = DetectionDataset(
        index, copy_paste=replace(made, rows=made.rows[:1], images=made.images[:1], chance=np.ones(1))
    )
    sample = sample_of(dataset, 4, 0)
    assert sample_of(DetectionDataset(index), 4, 0).negatives.tolist() == [False, False, False, True]
    assert sample.negatives.tolist() == [True, False, False, True]
    # Class 3 is known here, and nobody looked for it where the crop comes from: no negative loss under the crop.
    assert sample.labels.tolist()[-3:] == [0, 1, 3]
    assert sample.is_group_of.tolist()[-3:] == [False, False, True]
    paste = chosen(dataset.copy_paste, 4, 0)  # type: ignore[arg-type]
    np.testing.assert_allclose(sample.boxes[-1], paste.region)


@pytest.mark.parametrize("on", ["image", "crop"])
def test_a_class_that_is_not_exhaustive_stays_unknown_where_a_crop_is_pasted(on: str, tmp_path: Path) -> None:
    # Class 0 is pasted into image 4, which has a box of it.
    boxed: list[Rows] = [[(0, MIDDLE)], *([(0, CORNER)] for _ in range(8))]
    index = photos(tmp_path, boxed, classes=2, labelled=[[(1, False)] for _ in boxed])
    flags = np.zeros(9, dtype=np.uint8)
    flags[4 if on == "image" else 0] = 1 << FLAGS.index("IsNotExhaustive")
    index = replace(index, flags=flags)
    made = CopyPaste(index, 1.0, np.array([0]), np.zeros(1, dtype=np.int32), np.ones(1))
    sample = sample_of(DetectionDataset(index, copy_paste=made), 4, 0)
    # Unknown on the whole image, or under the crop alone.
    assert sample.negatives.tolist() == [on == "crop", True]
    assert (sample.labels.tolist()[-1], bool(sample.is_group_of[-1])) == (0, on == "crop")


def test_nothing_is_unknown_under_a_crop_of_an_exhaustive_set(tmp_path: Path) -> None:
    index = replace(frequent_and_rare(tmp_path), all_known=True)
    sample = sample_of(DetectionDataset(index, copy_paste=pasting(index)), 0, 0)
    assert sample.labels.tolist() == [0, 1]
    assert sample.negatives.all()


def test_only_classes_of_the_group_are_pasted(tmp_path: Path) -> None:
    boxed: list[Rows] = [[(2, MIDDLE)], [(1, MIDDLE)], *([(0, CORNER)] for _ in range(8))]
    index = photos(tmp_path, boxed, classes=3).with_classes(np.array([0, 1]))
    made = pasting(index)
    assert set(index.labels[made.rows].tolist()) == {1}


# Randomness


def dataset_of(folder: Path, probability: float = 0.5) -> DetectionDataset:
    index = frequent_and_rare(folder)
    made = CopyPaste.by_rarity(index, bins_of(index), probability=probability, balance=1.0)
    return DetectionDataset(index, Augmentation(np.array([0.3, 0.8]), base=0.3), copy_paste=made)


def assert_same(first: Sample, second: Sample) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_paste_and_no_global_state_is_read_or_moved(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 1.0)
    first = sample_of(dataset, 2, 7)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  (the point of the test)
    torch.manual_seed(3)
    states = str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert_same(first, sample_of(dataset, 2, 7))
    assert (str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()) == states  # noqa: NPY002
    assert len({sample_of(dataset, 2, seed).image.tobytes() for seed in range(10)}) == 10


def test_at_probability_0_samples_are_those_without_copy_paste(tmp_path: Path) -> None:
    index = frequent_and_rare(tmp_path)
    off, plain = dataset_of(tmp_path, 0.0), DetectionDataset(index, Augmentation(np.array([0.3, 0.8]), base=0.3))
    low = dataset_of(tmp_path, 0.2)
    spared = 0
    for seed in range(40):
        assert_same(sample_of(off, 2, seed), sample_of(plain, 2, seed))
        if low.copy_paste is not None and low.copy_paste.choose(2, SHAPE, seed=seed) is None:
            assert_same(sample_of(low, 2, seed), sample_of(plain, 2, seed))
            spared += 1
    assert 0 < spared < 40


@pytest.mark.parametrize(("seed", "by_class"), [(None, True), (5, False)], ids=["evaluation", "before balance_start"])
def test_nothing_is_pasted_in_an_evaluation_and_before_the_balanced_epochs(
    tmp_path: Path, seed: int | None, by_class: bool
) -> None:
    index = frequent_and_rare(tmp_path)
    dataset = DetectionDataset(index, copy_paste=pasting(index))
    assert_same(sample_of(dataset, 2, seed, by_class=by_class), sample_of(DetectionDataset(index), 2, seed))


@pytest.mark.slow
def test_any_number_of_workers_and_any_start_give_the_same_batches(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 0.7)
    batches = [PlannedBatch(SHAPE, np.array([n, n + 1, 8]), np.array([3 * n, 3 * n + 1, 3 * n + 2])) for n in range(6)]
    alone = list(BatchLoader(dataset).load(batches, seed=(4, 2)))
    shared = list(BatchLoader(dataset, workers=2).load(batches, seed=(4, 2)))
    late = list(BatchLoader(dataset).load(batches[2:], seed=(4, 2)))
    for first, second in [*zip(alone, shared, strict=True), *zip(alone[2:], late, strict=True)]:
        for name, value in vars(first).items():
            assert torch.equal(value, getattr(second, name)), name
    assert sum(int((batch.labels == 1).sum()) for batch in alone) > 6


# Unreadable images


def test_an_unreadable_image_of_a_crop_is_reported_and_nothing_is_pasted(tmp_path: Path) -> None:
    index = frequent_and_rare(tmp_path)
    index.file_of(8).write_bytes(b"not an image")
    dataset = DetectionDataset(index, copy_paste=pasting(index), replacements=2)
    batch = [PlannedBatch(SHAPE, np.array([2]), np.array([0]))]
    skipped: list[str] = []
    (loaded,) = BatchLoader(dataset).load(batch, seed=(0, 0), on_bad_image=lambda bad: skipped.append(bad.image_id))
    assert skipped == ["i0008"]
    assert loaded.image_index.tolist() == [2]
    assert loaded.labels.tolist() == [0]
    with pytest.raises(DataError, match=r"i0008\.png: not a readable image"):
        list(BatchLoader(dataset).load(batch, seed=(0, 0)))


# Exposure


def crowd(seed: int, *, images: int = 60) -> AnnotationIndex:
    """Random boxes of 5 classes of which the first are rare, class 4 above all others; no files."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, images)
    labels = np.minimum(rng.geometric(0.45, counts.sum()) - 1, 3)
    corners = rng.random((len(labels), 2)) * 0.6
    boxes = np.concatenate([corners, corners + 0.1 + 0.3 * rng.random((len(labels), 2))], axis=1)
    ids = tuple(f"/m/{number}" for number in range(5))
    taxonomy = Taxonomy(ids, ids, Hierarchy(tuple((ids[4], child) for child in ids[:4]), (), ids))
    made = make_index([[] for _ in range(images)], classes=5)
    return replace(
        made,
        taxonomy=taxonomy,
        sizes=np.full((images, 2), (300, 400), dtype=np.int32),
        box_start=row_starts(np.repeat(np.arange(images), counts), images),
        boxes=boxes,
        labels=(3 - labels).astype(np.int32),
        flags=np.zeros(len(labels), dtype=np.uint8),
    )


def plan_of(index: AnnotationIndex, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, len(index), length)


@pytest.mark.slow
def test_counted_pastes_are_within_chance_of_the_expected_ones() -> None:
    index = crowd(0)
    made = pasting(index, probability=0.8, num_bins=4)
    shapes, length = np.full((len(index), 2), (96, 128)), 2_000
    found = measure_pastes(made, plan_of(index, length), shapes, seed=0, epoch=3, expand=False)
    assert found.pasted_expected.sum() > 0.8 * length
    # A class comes with a crop once or a few times: the variance of a count is at most some times its mean.
    deviation = (found.pasted_planned - found.pasted_expected) / np.sqrt(np.maximum(found.pasted_expected, 1))
    assert np.abs(deviation).max() < 6
    assert found.covered_planned.sum() > 0
    expanded = measure_pastes(made, plan_of(index, length), shapes, seed=0, epoch=3, expand=True)
    np.testing.assert_allclose(expanded.pasted_expected[4], found.pasted_expected.sum())
    np.testing.assert_array_equal(expanded.covered_planned[:4], found.covered_planned[:4])
    assert expanded.covered_planned[4] == found.covered_planned.sum()


def test_expected_boxes_by_hand_with_what_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Class 1: one image, two boxes of which the first has a box of class 0 in it. L = 100, p = 0.5: 50 crops of class
    # 1, 25 of each box, and with the first one a box of class 0.
    rows: Rows = [(1, (0.1, 0.1, 0.4, 0.4)), (0, (0.2, 0.2, 0.3, 0.3)), (1, (0.6, 0.6, 0.9, 0.9))]
    made = pasting(photos(tmp_path, [rows, *([(0, CORNER)] for _ in range(8))], classes=2), probability=0.5)
    np.testing.assert_allclose(made.expected_boxes(100), [25, 50])
    monkeypatch.setattr(rules, "_CHUNK", 1)
    np.testing.assert_allclose(made.expected_boxes(100), [25, 50])


def test_counted_pastes_and_covers_are_those_of_the_samples_that_are_loaded(tmp_path: Path) -> None:
    grid: Rows = [(0, (x / 10, y / 10, x / 10 + 0.08, y / 10 + 0.08)) for x in range(10) for y in range(10)]
    index = photos(tmp_path, [grid, grid, *([(0, CORNER)] for _ in range(6)), [(1, MIDDLE)]], classes=2)
    index = replace(index, all_known=True)
    dataset = DetectionDataset(index, copy_paste=pasting(index, probability=0.6))
    plan = np.array([0, 1, 0, 8, 2, 1, 1, 0] * 3)
    found = measure_pastes(
        dataset.copy_paste,
        plan,
        np.full((9, 2), SHAPE),
        seed=5,
        epoch=2,
        expand=False,  # type: ignore[arg-type]
    )
    boxes = np.zeros(2)
    for position, image in enumerate(plan):
        sample = sample_of(dataset, int(image), seed_of_position((5, 2), position))
        boxes += np.bincount(sample.labels, minlength=2)
    own = np.bincount(
        np.concatenate([index.labels[index.box_start[i] : index.box_start[i + 1]] for i in plan]), minlength=2
    )
    assert (boxes - own).tolist() == (found.pasted_planned - found.covered_planned).tolist()
    assert found.covered_planned[0] > 0
    assert found.pasted_planned[1] > 0


def test_a_long_plan_is_counted_in_part_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    index = crowd(2)
    made, plan, shapes = pasting(index, num_bins=4), plan_of(index, 90), np.full((len(index), 2), (96, 128))
    monkeypatch.setattr("retinaflow.data.exposure.COUNTED", 30)
    part = measure_pastes(made, plan[:30], shapes, seed=0, epoch=0, expand=True)
    whole = measure_pastes(made, plan, shapes, seed=0, epoch=0, expand=True)
    np.testing.assert_allclose(whole.pasted_planned, 3 * part.pasted_planned)
    np.testing.assert_allclose(whole.covered_planned, 3 * part.covered_planned)


def test_the_exposure_table_has_three_more_columns_with_pastes_and_none_without() -> None:
    index = crowd(3)
    pairs = image_class_pairs(index)
    bins, exposures = bins_of(index, 4), {"uniform": measure_exposure(np.ones(len(index)), pairs, seed=0)}
    pastes = measure_pastes(
        pasting(index, num_bins=4), plan_of(index, 50), np.full((60, 2), 96), seed=0, epoch=0, expand=False
    )
    plain = exposure_table(exposures, pairs, bins, index.taxonomy)  # type: ignore[arg-type]
    table = exposure_table(exposures, pairs, bins, index.taxonomy, pastes=pastes)  # type: ignore[arg-type]
    assert list(table.columns) == [*plain.columns, "pasted_expected", "pasted_planned", "covered_planned"]
    row = table.set_index("class_id").loc["/m/0"]
    assert row["pasted_expected"] == pytest.approx(pastes.pasted_expected[0])
    assert make_taxonomy(5).ids == index.taxonomy.ids
