"""Planned batches -> tensors: what is in a batch, and that it does not matter who loads it."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_index import TinyDataset, make_index

from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets, PlannedBatch, plan_batches
from retinaflow.data.dataset import Batch, BatchLoader, DetectionDataset, Request, Sample, collate, keep_rates
from retinaflow.data.images import BadImage, attach_files
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.known_classes import known_classes
from retinaflow.data.openimages import find_files, read_annotations
from retinaflow.data.tables import RowErrors


def read_tiny(folder: Path, split: str = "train") -> AnnotationIndex:
    index = read_annotations(find_files(folder, [split]), RowErrors(), progress=lambda text: None)
    return attach_files(index, [folder / "images"])[0]


@pytest.fixture
def index(tiny_dataset: TinyDataset) -> AnnotationIndex:
    return read_tiny(tiny_dataset())


def batches_of(index: AnnotationIndex, batch_size: int = 4) -> list[PlannedBatch]:
    buckets = AspectBuckets.fit(index.sizes, image_size=64, num_buckets=3)
    plan = np.concatenate([np.arange(len(index)), [3, 3]])
    return plan_batches(plan, buckets.assign(index.sizes), buckets, batch_size=batch_size)


def strong(index: AnnotationIndex) -> Augmentation:
    return Augmentation(np.full(index.num_classes, 0.8), base=0.3)


def assert_same(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name


def half_red(folder: Path, height: int, width: int) -> AnnotationIndex:
    """One image, red in its left quarter, with an ordinary box there, a group-of box and two labels; 1 > 0, 3 > 4."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 4, 2] = 250  # OpenCV writes BGR
    assert cv2.imwrite(str(folder / "i0000.png"), pixels)
    index = make_index([[0, 2]], classes=6, links=[(1, 0), (3, 4)], labelled=[[(3, False), (2, True)]], group_of=[1])
    index = replace(index, boxes=np.array([[0.0, 0.0, 0.25, 1.0], [0.5, 0.5, 1.0, 0.75]]))
    return attach_files(index, [folder])[0]


def test_a_batch_of_a_non_square_image_by_hand(tmp_path: Path) -> None:
    index = half_red(tmp_path, 60, 200)
    (batch,) = BatchLoader(DetectionDataset(index)).load([PlannedBatch((32, 128), np.array([0]), np.array([5]))])
    assert batch.images.shape == (1, 3, 32, 128), "[B, 3, H, W]"
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    # Red, the first channel, fills the left quarter: 32 of 128 columns.
    assert batch.images[0, 0, :, :31].min() > 200
    assert batch.images[0, 0, :, 33:].max() < 50
    assert batch.images[0, 1:].max() < 50
    # x is scaled by the width 128 and y by the height 32.
    assert batch.boxes.tolist() == [[0, 0, 32, 32]]
    assert batch.boxes.dtype == torch.float32
    assert batch.labels.tolist() == [0]
    assert batch.owner.tolist() == [0]
    # The group-of box is no ground truth but a region.
    assert batch.ignore_boxes.tolist() == [[64, 16, 128, 24]]
    assert batch.ignore_labels.tolist() == [2]
    assert batch.ignore_owner.tolist() == [0]
    # A box of 0 says so of its parent 1; 2 is labelled present; 3 absent, so its child 4 too; of 5 nothing is known.
    assert batch.negatives.tolist() == [[True, True, True, True, True, False]]
    assert batch.image_index.tolist() == [0]
    assert len(batch) == 1


def test_an_image_without_boxes_makes_empty_tensors_of_the_right_shape(index: AnnotationIndex) -> None:
    assert index.box_start[4] == index.box_start[5]
    (batch,) = BatchLoader(DetectionDataset(index)).load([PlannedBatch((64, 64), np.array([4]), np.array([0]))])
    assert batch.boxes.shape == batch.ignore_boxes.shape == (0, 4)
    assert batch.labels.shape == batch.owner.shape == batch.ignore_owner.shape == (0,)
    assert batch.labels.dtype == batch.owner.dtype == torch.int64


def test_every_row_belongs_to_its_owner_in_order(index: AnnotationIndex) -> None:
    batches = batches_of(index)
    seen = []
    for planned, batch in zip(batches, BatchLoader(DetectionDataset(index)).load(batches), strict=True):
        assert tuple(batch.images.shape[2:]) == planned.shape
        assert batch.image_index.tolist() == planned.images.tolist()
        seen += batch.image_index.tolist()
        height, width = planned.shape
        for place, image in enumerate(planned.images):
            rows = np.arange(index.box_start[image], index.box_start[image + 1])
            for group, boxes, labels, owner in (
                (False, batch.boxes, batch.labels, batch.owner),
                (True, batch.ignore_boxes, batch.ignore_labels, batch.ignore_owner),
            ):
                wanted = rows[index.is_group_of[rows] == group]
                own = owner == place
                assert labels[own].tolist() == index.labels[wanted].tolist()
                np.testing.assert_allclose(
                    boxes[own].numpy(), index.boxes[wanted] * [width, height, width, height], rtol=1e-6
                )
            assert batch.negatives[place].tolist() == known_classes(index, int(image)).tolist()
    assert sorted(seen) == sorted([*range(12), 3, 3])


def test_the_colours_of_the_boxes_are_where_the_boxes_are(index: AnnotationIndex) -> None:
    checked = 0
    for batch in BatchLoader(DetectionDataset(index)).load(batches_of(index)):
        for (x1, y1, x2, y2), label, owner in zip(batch.boxes, batch.labels, batch.owner, strict=True):
            red, green, blue = batch.images[owner, :, int(y1 + y2) // 2, int(x1 + x2) // 2].tolist()
            name = index.taxonomy.names[label]
            brightest = {red: "Car", green: "Tree", blue: "Bus"}[max(red, green, blue)] if name != "Vehicle" else name
            assert brightest == name
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("seed", [None, (3, 1)], ids=["as it is", "augmented"])
def test_two_workers_give_what_no_worker_gives(
    seed: tuple[int, int] | None, index: AnnotationIndex, tmp_path: Path
) -> None:
    index.save(tmp_path / "saved")
    opened = AnnotationIndex.open(tmp_path / "saved")
    batches = batches_of(index)
    alone = BatchLoader(DetectionDataset(index, strong(index)))
    together = BatchLoader(DetectionDataset(opened, strong(index)), workers=2)
    for planned in (batches, batches[:2], batches):
        first = list(alone.load(planned, seed=seed))
        second = list(together.load(planned, seed=seed))
        assert len(first) == len(second) == len(planned)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)


def test_augmentation_goes_by_seed_epoch_and_place_in_the_plan(index: AnnotationIndex) -> None:
    dataset = DetectionDataset(index, strong(index))
    loader = BatchLoader(dataset)
    planned = [PlannedBatch((64, 96), np.array([0, 0]), np.array([7, 9]))]
    (one,) = loader.load(planned, seed=(1, 2))
    assert not torch.equal(one.images[0], one.images[1]), "a repeated image is changed anew each time"
    (alone,) = loader.load([PlannedBatch((64, 96), np.array([0]), np.array([9]))], seed=(1, 2))
    assert torch.equal(alone.images[0], one.images[1]), "whichever batch it stands in"
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(next(loader.load(planned, seed=other)).images, one.images)
    (plain,) = loader.load(planned)
    (never,) = BatchLoader(DetectionDataset(index)).load(planned, seed=(1, 2))
    assert_same(plain, never)


def test_augmented_rows_keep_their_labels_flags_and_number_of_boxes_in_step(index: AnnotationIndex) -> None:
    dataset = DetectionDataset(index, strong(index))
    fewer = 0
    for seed in range(40):
        sample = dataset[Request(3, (64, 96), seed)]
        assert len(sample.boxes) == len(sample.labels) == len(sample.is_group_of)
        fewer += len(sample.boxes) < index.box_start[4] - index.box_start[3]
        assert set(sample.labels.tolist()) <= set(index.labels[index.box_start[3] : index.box_start[4]].tolist())
        assert (sample.boxes[:, 2] <= 96).all()
        assert (sample.boxes[:, 3] <= 64).all()
    assert fewer < 40
    group_of = dataset[Request(0, (64, 96), None)]
    assert group_of.is_group_of.tolist() == [True]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_moves_no_global_random_state_and_reads_none(workers: int, index: AnnotationIndex) -> None:
    batches = batches_of(index)
    first = list(BatchLoader(DetectionDataset(index, strong(index)), workers=workers).load(batches, seed=(0, 0)))
    np.random.seed(8)  # noqa: NPY002  (the point of the test)
    random.seed(8)
    torch.manual_seed(8)
    states = str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    again = list(BatchLoader(DetectionDataset(index, strong(index)), workers=workers).load(batches, seed=(0, 0)))
    assert (str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()) == states  # noqa: NPY002
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoding_error_names_the_file(workers: int, index: AnnotationIndex) -> None:
    index.file_of(2).write_bytes(b"no image any more")
    loader = BatchLoader(DetectionDataset(index), workers=workers)
    with pytest.raises(ValueError, match=r"train002\.jpg: not a readable image"):
        list(loader.load([PlannedBatch((64, 64), np.array([2]), np.array([0]))]))


def test_no_batches_are_loaded_for_an_empty_plan(index: AnnotationIndex) -> None:
    assert list(BatchLoader(DetectionDataset(index)).load([])) == []


def test_a_batch_moved_to_a_device_is_the_same_batch(index: AnnotationIndex) -> None:
    batch = collate([DetectionDataset(index)[Request(image, (64, 96), None)] for image in range(3)])
    assert_same(batch.to(torch.device("cpu")), batch)


def test_a_box_that_float32_gives_no_width_is_left_out_of_the_batch(index: AnnotationIndex) -> None:
    sample = DetectionDataset(index)[Request(0, (64, 96), None)]
    assert isinstance(sample, Sample)
    boxes = np.array([[59.9999985, 5, 60, 25], [1, 2, 3, 4], [10, 8.00000001, 20, 8.00000002], [10, 8, 20, 9]])
    batch = collate(
        [sample._replace(boxes=boxes, labels=np.arange(4), is_group_of=np.array([False, False, True, True]))]
    )
    assert (batch.boxes.tolist(), batch.labels.tolist(), batch.owner.tolist()) == ([[1, 2, 3, 4]], [1], [0])
    assert (batch.ignore_boxes.tolist(), batch.ignore_labels.tolist()) == ([[10, 8, 20, 9]], [3])


def test_the_tiny_data_set_is_what_it_says(tiny_dataset: TinyDataset) -> None:
    folder = tiny_dataset("other", train=24, validation=6, seed=1)
    train, validation = read_tiny(folder), read_tiny(folder, "validation")
    assert (len(train), len(validation)) == (24, 6)
    images = [len({int(i) for i in train.box_image[train.labels == k]}) for k in range(5)]
    names = dict(zip(train.taxonomy.names, images, strict=True))
    assert names == {"Car": 12, "Vehicle": 1, "Tree": 15, "Plant": 0, "Bus": 4}
    assert train.taxonomy.ancestors(train.taxonomy.find("Bus")).tolist() == [train.taxonomy.find("Vehicle")]
    assert train.is_group_of.sum() == validation.is_group_of.sum() == 1
    assert read_tiny(tiny_dataset("again", train=24, seed=1)).digest == train.digest
    assert read_tiny(tiny_dataset("another", train=24, seed=2)).digest != train.digest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoding_error_ends_the_workers_at_once_and_shows_nothing_of_them(
    workers: int, index: AnnotationIndex
) -> None:
    index.file_of(5).write_bytes(b"no image any more")
    of_others = set(multiprocessing.active_children())
    loader = BatchLoader(DetectionDataset(index), workers=workers)
    with pytest.raises(ValueError) as caught:
        list(loader.load(batches_of(index)))
    start = time.monotonic()
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).startswith(str(index.file_of(5)))
    assert str(caught.value).endswith("; replace the file, or give on_bad_image=skip")
    del loader, caught
    gc.collect()
    assert set(multiprocessing.active_children()) <= of_others
    # A worker that is waited for in vain costs 5 s, and there are two.
    assert time.monotonic() - start < 9


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_becomes_unreadable_is_told_and_left_out_of_its_batch(
    workers: int, index: AnnotationIndex
) -> None:
    index.file_of(2).write_bytes(b"no image any more")
    told: list[BadImage] = []
    batches = [PlannedBatch((64, 64), np.array(images), np.array(images)) for images in ([0, 2], [2], [1, 3])]
    loader = BatchLoader(DetectionDataset(index), workers=workers)
    found = [batch.image_index.tolist() for batch in loader.load(batches, on_bad_image=told.append)]
    assert found == [[0], [1, 3]], "a batch of which nothing is left is left out"
    assert [image.image_id for image in told] == ["train002", "train002"]
    assert "train002.jpg: not a readable image" in told[0].reason


@pytest.mark.parametrize("workers", [0, 2])
def test_with_replacements_every_batch_keeps_its_size_and_the_next_readable_image_takes_the_place(
    workers: int, index: AnnotationIndex
) -> None:
    for image in (2, 3, 11):
        index.file_of(image).write_bytes(b"no image any more")
    told: list[BadImage] = []
    batches = [PlannedBatch((64, 96), np.array(images), np.array(images)) for images in ([0, 2], [11])]
    loader = BatchLoader(DetectionDataset(index, strong(index), replacements=2), workers=workers)
    loaded = list(loader.load(batches, seed=(0, 0), on_bad_image=told.append))
    assert [batch.image_index.tolist() for batch in loaded] == [[0, 4], [0]]
    assert [image.image_id for image in told] == ["train002", "train003", "train011"]
    fresh = DetectionDataset(index, strong(index))
    sample = fresh.sample(Request(4, (64, 96), _seeds_of(batches[0], (0, 0))[0]))
    np.testing.assert_array_equal(loaded[0].images[1].permute(1, 2, 0).numpy(), sample.image)


def _seeds_of(batch: PlannedBatch, seed: tuple[int, int]) -> list[int]:
    """Of the second image of a batch on."""
    return [
        int(np.random.SeedSequence([*seed, int(position)]).generate_state(1)[0]) for position in batch.positions[1:]
    ]


def test_images_that_cannot_be_read_in_a_row_stop_a_training_that_may_skip_one(index: AnnotationIndex) -> None:
    for image in range(len(index)):
        index.file_of(image).unlink()
    loader = BatchLoader(DetectionDataset(index, replacements=3))
    batch = PlannedBatch((64, 64), np.array([2]), np.array([2]))
    with pytest.raises(
        ValueError,
        match=r"at least one image of a batch must be readable, but none of 4 is.*train002\.jpg.*Check the disk",
    ):
        list(loader.load([batch], on_bad_image=lambda image: None))


def test_requests_of_an_epoch_are_made_batch_by_batch(index: AnnotationIndex) -> None:
    class Endless(list[PlannedBatch]):
        taken = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            while True:
                self.taken += 1
                yield PlannedBatch((64, 64), np.array([0]), np.array([0]))

    endless = Endless()
    loaded = BatchLoader(DetectionDataset(index)).load(endless)
    for _ in range(3):
        next(loaded)
    assert endless.taken <= 4


# Boxes that are not learned this time


def test_the_rate_leaves_the_most_of_a_frequent_class_and_all_of_a_rare_one() -> None:
    index = make_index([[0, 0, 0, 1], [0, 0, 0, 0, 0]], classes=3)
    # 8 boxes of class 0, 1 of class 1, none of class 2.
    rates = keep_rates(index, most=2)
    assert rates is not None
    assert rates.tolist() == [0.25, 1.0, 1.0]
    assert keep_rates(index, most=0) is None


def test_boxes_above_the_limit_become_regions_to_ignore_anew_at_each_draw(index: AnnotationIndex) -> None:
    plain, limited = DetectionDataset(index), DetectionDataset(index, None, keep_rate=keep_rates(index, most=3))
    counts = np.bincount(index.labels, minlength=index.num_classes)
    kept = np.zeros(index.num_classes)
    passes = 200
    different = set()
    for seed in range(passes):
        flags = []
        for image in range(len(index)):
            rows = np.arange(index.box_start[image], index.box_start[image + 1])
            ignored = limited._ignored(rows, seed * 1000 + image)
            np.add.at(kept, index.labels[rows], ~ignored)
            flags += ignored.tolist()
        different.add(tuple(flags))
    np.testing.assert_allclose(kept / passes, np.minimum(counts, 3), rtol=0.1)
    assert len(different) > passes / 2
    request = Request(1, (64, 64), seed=7)
    first, again, whole = limited[request], limited[request], plain[request]
    assert first.is_group_of.tolist() == again.is_group_of.tolist()
    # The same boxes, the same image: only what they are for has changed.
    assert (first.boxes == whole.boxes).all()
    assert (first.image == whole.image).all()


def test_without_a_seed_as_in_judging_no_box_is_ignored(index: AnnotationIndex) -> None:
    limited = DetectionDataset(index, None, keep_rate=np.zeros(index.num_classes))
    assert limited[Request(1, (64, 64), None)].is_group_of.tolist() == [False] * int(
        index.box_start[2] - index.box_start[1]
    )
    assert limited[Request(1, (64, 64), 0)].is_group_of.all()
