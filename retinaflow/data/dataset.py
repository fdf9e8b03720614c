"""Planned batches -> tensors: the Dataset that decodes, resizes and augments, the collate function, and the loader.

A request for a dataset item holds everything that it depends on (image, shape, seed). So workers have no state, live as
long as the training, and any of them gives the same pixels. Images stay uint8 until they are on the device.

A worker returns an image that cannot be decoded as a :class:`BadImage` and not as an exception: the loader decides
whether to stop, and its error names the file without the traceback of a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retinaflow.boxes import pixels_from_normalised
from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import PlannedBatch
from retinaflow.data.copy_paste import CopyPaste, Paste
from retinaflow.data.images import BadImage, UnreadableImageError, decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.known_classes import known_classes, not_exhaustive
from retinaflow.data.sampling import seed_of_position
from retinaflow.errors import DataError


@dataclass(frozen=True)
class Batch:
    """B images of one shape with their annotations; boxes in pixels of the resized image, xyxy."""

    images: Tensor
    """``[B, 3, H, W]`` uint8, RGB, channels-last in memory."""
    boxes: Tensor
    """``[P, 4]`` float32, ordinary boxes."""
    labels: Tensor
    """``[P]`` int64 class of each box."""
    owner: Tensor
    """``[P]`` int64 image of each box within the batch, ascending."""
    ignore_boxes: Tensor
    """``[G, 4]`` float32, group-of boxes: no negative loss inside for their class, its ancestors and descendants."""
    ignore_labels: Tensor
    """``[G]`` int64."""
    ignore_owner: Tensor
    """``[G]`` int64, ascending."""
    negatives: Tensor
    """``[B, K]`` bool: classes known on the image; the others give no negative loss."""
    image_index: Tensor
    """``[B]`` int64 image in the index."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; a copy from pinned memory does not block."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the loader calls this."""
        return replace(self, **{name: value.pin_memory() for name, value in vars(self).items()})


PREFETCH = 2
"""Batches that each worker prepares: enough to cover a slow one, and few in memory."""
MAX_REPLACEMENTS = 8
"""Images tried in place of an unreadable one in a training with on_bad_image=skip."""


class Request(NamedTuple):
    """One dataset item: the image, its (height, width), the seed of its augmentation (None: none), and whether the
    strength depends on its classes and a crop of a rare class may be pasted."""

    image: int
    shape: tuple[int, int]
    seed: int | None
    by_class: bool = True


class Sample(NamedTuple):
    """One image ready for a batch; boxes in pixels of the resized image."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.floating]
    labels: NDArray[np.int32]
    is_group_of: NDArray[np.bool_]
    negatives: NDArray[np.bool_]
    number: int
    """Index of the image."""
    instead_of: tuple[BadImage, ...] = ()
    """Unreadable images: those that this one replaces, and one of which a crop should have been pasted."""


class NoSample(NamedTuple):
    """The result of a request whose image cannot be read and has no replacement."""

    bad: tuple[BadImage, ...]


@dataclass(frozen=True)
class DetectionDataset(Dataset[Sample | NoSample]):
    """Samples of an index by :class:`Request`.

    ``replacements``: number of following images in the index that are tried in place of an unreadable one; 0: none.
    Training needs them, so that every rank takes the same number of steps; an evaluation does not.
    """

    index: AnnotationIndex
    augmentation: Augmentation | None = None
    replacements: int = 0
    keep_rate: NDArray[np.float64] | None = None
    """``[K]`` probability, from :func:`keep_rates`, that a box is used when its image is sampled; otherwise it becomes
    an ignore region, like a group-of box. None: every box is used."""
    copy_paste: CopyPaste | None = None
    """Crops of rare classes that are pasted into other images. None: none."""

    def __getitem__(self, request: Request) -> Sample | NoSample:
        bad: tuple[BadImage, ...] = ()
        for step in range(min(self.replacements + 1, len(self.index))):
            image = (request.image + step) % len(self.index)
            try:
                sample = self.sample(request._replace(image=image))
                return sample._replace(instead_of=bad + sample.instead_of)
            except UnreadableImageError as error:
                bad += (BadImage(str(self.index.image_ids[image]), str(error)),)
        return NoSample(bad)

    def sample(self, request: Request) -> Sample:
        """The sample of this image. Raises UnreadableImageError, which names its file."""
        index, image = self.index, request.image
        height, width = (int(side) for side in index.sizes[image])
        pixels = decode(index.file_of(image), (height, width), request.shape)
        own = rows = np.arange(index.box_start[image], index.box_start[image + 1])
        boxes, regions, negatives = np.asarray(index.boxes[rows]), _no_classes(), known_classes(index, image)
        pixels, paste, bad = self._pasted(pixels, request)
        if self.copy_paste is not None and paste is not None:
            regions = self.copy_paste.unknown(image, paste)
            region = paste.region / np.tile(request.shape[::-1], 2)
            boxes = np.concatenate([boxes[~paste.covered], paste.boxes, np.tile(region, (len(regions), 1))])
            rows = np.concatenate([rows[~paste.covered], paste.rows])
            pasted = np.arange(len(negatives)) == index.labels[paste.rows[0]]
            negatives = negatives | (pasted & ~not_exhaustive(index, image))
        labels = np.concatenate([index.labels[rows], regions])
        is_group_of = np.ones(len(labels), dtype=bool)
        is_group_of[: len(rows)] = index.is_group_of[rows] | self._ignored(rows, request.seed)
        if self.augmentation is not None and request.seed is not None:
            # A crop has its own changes: the strength is that of the image it is pasted into.
            pixels, boxes, visible = self.augmentation.apply(
                pixels, boxes, labels=np.asarray(index.labels[own]), seed=request.seed, by_class=request.by_class
            )
            labels, is_group_of = labels[visible], is_group_of[visible]
        return Sample(pixels, pixels_from_normalised(boxes, request.shape), labels, is_group_of, negatives, image, bad)

    def _pasted(
        self, pixels: NDArray[np.uint8], request: Request
    ) -> tuple[NDArray[np.uint8], Paste | None, tuple[BadImage, ...]]:
        """The image with the crop that this request gets, the crop, and the image of the crop if it is unreadable."""
        if self.copy_paste is None or request.seed is None or not request.by_class:
            return pixels, None, ()
        paste = self.copy_paste.choose(request.image, request.shape, seed=request.seed)
        if paste is None:
            return pixels, None, ()
        try:
            return self.copy_paste.draw(pixels, paste), paste, ()
        except UnreadableImageError as error:
            return pixels, None, (BadImage(str(self.index.image_ids[paste.source]), str(error)),)

    def _ignored(self, rows: NDArray[np.int64], seed: int | None) -> NDArray[np.bool_]:
        if self.keep_rate is None or seed is None:
            return np.zeros(len(rows), dtype=bool)
        # The second number makes this independent of the augmentation.
        chance = np.random.default_rng([seed, 1]).random(len(rows))
        return np.asarray(chance >= self.keep_rate[self.index.labels[rows]])


def _no_classes() -> NDArray[np.int32]:
    return np.zeros(0, dtype=np.int32)


def keep_rates(index: AnnotationIndex, *, most: int) -> NDArray[np.float64] | None:
    """``[K]`` fraction of the boxes of each class that leaves ``most`` of them on average, 1 for classes with fewer.

    None for ``most=0``: every box is used.
    """
    if most == 0:
        return None
    boxes = np.bincount(index.labels, minlength=index.num_classes)
    return np.asarray(most / np.maximum(boxes, most))


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape -> Batch; group-of boxes become ignore regions."""
    ordinary = [np.flatnonzero(~sample.is_group_of) for sample in samples]
    group_of = [np.flatnonzero(sample.is_group_of) for sample in samples]
    boxes, labels, owner = _gather(samples, ordinary)
    ignore_boxes, ignore_labels, ignore_owner = _gather(samples, group_of)
    # [B, H, W, 3] viewed as [B, 3, H, W]: channels-last, the memory order with the fastest convolutions.
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    negatives = torch.from_numpy(np.stack([sample.negatives for sample in samples]))
    image_index = torch.tensor([sample.number for sample in samples])
    return Batch(images, boxes, labels, owner, ignore_boxes, ignore_labels, ignore_owner, negatives, image_index)


def _gather(samples: Sequence[Sample], rows: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor, Tensor]:
    boxes = np.concatenate([sample.boxes[own] for sample, own in zip(samples, rows, strict=True)]).astype(np.float32)
    labels = np.concatenate([sample.labels[own] for sample, own in zip(samples, rows, strict=True)])
    owner = np.repeat(np.arange(len(samples)), [len(own) for own in rows])
    # A box that has no width or height left in float32 teaches nothing.
    wide = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
    return (
        torch.from_numpy(boxes[wide]),
        torch.from_numpy(labels[wide].astype(np.int64)),
        torch.from_numpy(owner[wide].astype(np.int64)),
    )


def _collate_readable(items: Sequence[Sample | NoSample]) -> tuple[Batch | None, tuple[BadImage, ...]]:
    """The batch of the readable images (None if there are none), and the unreadable ones."""
    samples = [item for item in items if isinstance(item, Sample)]
    bad = tuple(image for item in items for image in (item.instead_of if isinstance(item, Sample) else item.bad))
    return collate(samples) if samples else None, bad


@dataclass
class _EpochRequests:
    """A batch sampler with new batches for each epoch, so that the workers live from epoch to epoch.

    Requests are made when a batch is due: those of an epoch of millions of images would need much time and memory.
    """

    batches: Sequence[PlannedBatch] = ()
    seed: Sequence[int] | None = None
    by_class: bool = True

    def __iter__(self) -> Iterator[list[Request]]:
        return (list(_requests(batch, self.seed, self.by_class)) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class BatchLoader:
    """Loads planned batches with ``workers`` processes that stay alive from epoch to epoch (0: in this process).

    Each worker prepares ``PREFETCH`` batches in advance. ``pin_memory``: for a GPU, so that copies to it do not block.
    """

    def __init__(self, dataset: DetectionDataset, *, workers: int = 0, pin_memory: bool = False) -> None:
        self._requests = _EpochRequests()
        self._replacements = dataset.replacements
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._requests,
            collate_fn=_collate_readable,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_one_thread,
            # A generator of its own, because the loader takes a number per epoch from the global one by default.
            generator=torch.Generator(),
        )

    def load(
        self,
        batches: Sequence[PlannedBatch],
        *,
        seed: Sequence[int] | None = None,
        by_class: bool = True,
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> Iterator[Batch]:
        """The tensors of the batches, in order. ``seed`` (seed, epoch) switches augmentation on, ``by_class`` the
        strength by class.

        An unreadable image raises DataError, which names its file. With ``on_bad_image`` that function gets it instead,
        and its batch is smaller, unless the dataset has replacements. A batch without a readable image is left out, or,
        with replacements, raises DataError: so many unreadable images in a row have a common cause.
        """
        self._requests.batches, self._requests.seed, self._requests.by_class = batches, seed, by_class
        for batch, bad in self._loader:
            for image in bad:
                if on_bad_image is None:
                    raise DataError(f"{image.reason}; replace the file, or give on_bad_image=skip")
                on_bad_image(image)
            if batch is not None:
                yield batch
            elif self._replacements:
                raise DataError(
                    f"at least one image of a batch must be readable, but none of {len(bad):,} is, replacements "
                    f"included; the first: {bad[0].reason}. Check the disk."
                )


def _requests(batch: PlannedBatch, seed: Sequence[int] | None, by_class: bool) -> Iterator[Request]:
    for image, position in zip(batch.images, batch.positions, strict=True):
        own = None if seed is None else seed_of_position(seed, int(position))
        yield Request(int(image), batch.shape, own, by_class)


def _one_thread(worker: int) -> None:
    """One thread per worker: more would compete with the other workers for the cores."""
    del worker
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
