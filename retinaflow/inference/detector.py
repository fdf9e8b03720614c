"""The one way from a trained network to detections: :class:`Detector`.

Training, ``evaluate``, ``predict``, ``visualize``, ``merge``, ``export`` and the served model use it, so that they
agree on device, precision, loader processes, image shapes, postprocessing and parent classes. Settings that are not
given are those of the training, which the checkpoint holds::

    detector = Detector.load(Path("best.pt"), DetectorSettings(score_threshold=0.3))
    detections = detector.detect(index)

A merged model is loaded in the same way, as a :class:`MergedDetector`: each member detects as it was trained, its
scores are calibrated, and the detections of all are joined.

Images are never augmented, and each is seen exactly once in the shape of its own aspect bucket. Detections of an image
do not depend on the other images of its batch or on the batch size, to the rounding of float32; with equal batches on
one CPU they are equal to the last bit, whichever command makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaflow.data.batching import AspectBuckets, PlannedBatch
from retinaflow.data.dataset import BatchLoader, DetectionDataset
from retinaflow.data.images import BadImage, decode_bytes
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.detector.device import Precision, autocast, device_of, loader_workers, precision_on
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.postprocess import detect
from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import Checkpoint
from retinaflow.inference.merged_checkpoint import MergedCheckpoint, Model, load_model
from retinaflow.inference.merged_detections import merge_detections
from retinaflow.settings.model_settings import (
    DetectorSettings,
    EvaluationSettings,
    JoinSettings,
    OverlapSettings,
    PostprocessSettings,
)
from retinaflow.settings.resolve import changed
from retinaflow.statistics.calibration import apply_calibrators
from retinaflow.taxonomy import Taxonomy

Parents = Literal["trained", "expand"]
Given = TypeVar("Given", bound=PostprocessSettings)


def as_trained(config: Given, checkpoint: Model) -> Given:
    """Settings of a command with those of detections and precision from the training, where they were not given.

    Raises SettingError for a checkpoint of an earlier version whose training had settings that are not available now,
    and for a setting that the members of a merged model do not take.
    """
    if isinstance(checkpoint, MergedCheckpoint):
        _refuse_settings_of_members(config, checkpoint)
    names = {*EvaluationSettings.model_fields, "precision"} & set(type(config).model_fields) - config.model_fields_set
    trained = checkpoint.settings
    return changed(config, {name: trained[name] for name in names if name in trained})


def _refuse_settings_of_members(config: PostprocessSettings, merged: MergedCheckpoint) -> None:
    """Raise SettingError for a given setting by which not all members detect: each does as it was trained."""
    is_expanded = merged.join.expand_predictions or getattr(config, "parents", "trained") == "expand"
    of_members = {"nms", "candidates_per", "image_size"} | (set() if is_expanded else {"nms_iou"})
    for name in sorted(of_members & config.model_fields_set):
        value = getattr(config, name)
        default = getattr(type(config)(), name)
        own = {member.checkpoint.settings.get(name, default) for member in merged.members}
        if value != "trained" and (name == "image_size" or own != {value}):
            raise SettingError(
                f"the members of a merged model detect as they were trained, so {name} must not be given, but got "
                f"{name}={value}; evaluate each member with it, and merge these runs"
            )


def by_image(found: Detections) -> Detections:
    """The rows in the order of their images; the order within an image stays."""
    return found.take(np.argsort(found.image_index, kind="stable"))


@dataclass(frozen=True, eq=False)
class Detector:
    """A network with all that decides its detections. Made by :meth:`load` or :meth:`around`.

    ``ancestors``: ``[K, K]`` bool on the device, row c marks the classes that detections of c are copied to, or None.
    """

    network: RetinaNet
    taxonomy: Taxonomy
    buckets: AspectBuckets
    postprocess: PostprocessSettings
    ancestors: Tensor | None
    device: torch.device
    precision: Precision
    batch_size: int
    workers: int

    @staticmethod
    def load(
        checkpoint: Model | Path,
        settings: DetectorSettings | None = None,
        *,
        parents: Parents = "trained",
        sizes: NDArray[np.integer] | None = None,
        device: torch.device | None = None,
    ) -> Detector | MergedDetector:
        """The detector of a checkpoint or a merged model, on the first GPU or the CPU unless ``device`` is given.

        ``settings``: as trained where they were not given. ``parents="expand"``: detections are copied to ancestor
        classes even if the training did not do so. ``sizes [I, 2]``: (height, width) of the images to come, to which
        as many shapes as in the training are fitted when ``settings.image_size`` is a number.

        Errors as of :func:`retinaflow.inference.checkpoint.load_checkpoint`, and SettingError for a setting that a
        merged model does not take.
        """
        if isinstance(checkpoint, Path):
            checkpoint = load_model(checkpoint)
        if isinstance(checkpoint, MergedCheckpoint):
            return MergedDetector.of(checkpoint, settings or DetectorSettings(), parents, device)
        network = checkpoint.build(device or device_of())
        return Detector.around(network, checkpoint, settings, parents=parents, sizes=sizes)

    @staticmethod
    def around(
        network: RetinaNet,
        checkpoint: Checkpoint,
        settings: DetectorSettings | None = None,
        *,
        parents: Parents = "trained",
        sizes: NDArray[np.integer] | None = None,
    ) -> Detector:
        """A network in use, such as one in training, as :meth:`load` makes it of its checkpoint; it stays where it is.

        Arguments as of :meth:`load`.
        """
        settings = as_trained(settings or DetectorSettings(), checkpoint)
        device = next(network.parameters()).device
        taxonomy = checkpoint.taxonomy
        is_expanded = "expand" in (parents, checkpoint.parents)
        return Detector(
            network=network,
            taxonomy=taxonomy,
            buckets=_buckets(checkpoint.buckets, settings.image_size, sizes),
            postprocess=settings,
            ancestors=torch.from_numpy(taxonomy.is_ancestor).to(device) if is_expanded else None,
            device=device,
            precision=precision_on(device, settings.precision),
            batch_size=settings.batch_size,
            workers=loader_workers(settings.workers, device),
        )

    def detect(
        self,
        images: AnnotationIndex,
        *,
        rank: int = 0,
        world_size: int = 1,
        after_batch: Callable[[int], None] = lambda images: None,
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> Detections:
        """Detections on the images of an index, normalised to each image; images in order, best score first within one.

        ``rank``, ``world_size``: of several processes each takes every ``world_size``-th batch; :func:`by_image` puts
        the concatenated detections of all into the order of one process. ``after_batch`` is called with the number of
        images of each batch that is done, for a progress bar or to stop by raising. ``on_bad_image`` is called for
        images that cannot be read, which get no detections; without it such an image is a DataError. The network is
        left in the mode it was in.
        """
        loader = BatchLoader(DetectionDataset(images), workers=self.workers, pin_memory=self.device.type == "cuda")
        batches = list(_batches(images, self.buckets, self.batch_size))[rank::world_size]
        parts = []
        for batch in loader.load(batches, on_bad_image=on_bad_image):
            parts.append(self._detections(batch.images, batch.image_index.numpy()))
            after_batch(len(batch))
        return by_image(Detections.concatenate(parts))

    def detect_file(self, data: NDArray[np.uint8], size: tuple[int, int]) -> Detections:
        """Detections on one image from the bytes of its file; ``size``: its (height, width).

        The image is decoded and resized as the loader does it. Raises UnreadableImageError, a ValueError.
        """
        shape = self.buckets.shapes[int(self.buckets.assign(np.array([size]))[0])]
        pixels = decode_bytes(data, size, shape, name="image")
        return self._detections(torch.from_numpy(pixels).permute(2, 0, 1)[None], np.zeros(1, dtype=np.int64))

    def _detections(self, images: Tensor, image_index: NDArray[np.integer[Any]]) -> Detections:
        """Of ``images [B, 3, H, W]`` uint8 RGB, which are the images ``image_index [B]``."""
        grid = self.network.anchors((images.shape[2], images.shape[3]))
        with torch.inference_mode(), autocast(self.device, self.precision), _evaluating(self.network):
            output = self.network(images.to(self.device, non_blocking=True))
            found = detect(output, grid, config=self.postprocess, ancestors=self.ancestors)
        return Detections(
            image_index[found.owner.cpu().numpy()].astype(np.int32),
            found.label.cpu().numpy().astype(np.int32),
            found.score.cpu().numpy(),
            found.boxes.cpu().numpy(),
        )


@dataclass(frozen=True, eq=False)
class MergedDetector:
    """The detectors of a merged model as one. Made by :meth:`Detector.load`.

    Its detections are those that ``merge`` makes of the members' detections with the same calibrators, to the last bit
    where the members' are equal.
    """

    merged: MergedCheckpoint
    members: tuple[Detector, ...]
    join: JoinSettings
    score_threshold: float

    @staticmethod
    def of(
        merged: MergedCheckpoint, settings: DetectorSettings, parents: Parents, device: torch.device | None
    ) -> MergedDetector:
        """Arguments as of :meth:`Detector.load`. The limits of detections and the minimum score are those of the join,
        the rest of ``settings`` goes to the members."""
        settings = as_trained(settings, merged)
        own: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers}
        if "precision" in settings.model_fields_set:
            own["precision"] = settings.precision
        checkpoints = [member.checkpoint for member in merged.members]
        place = device or device_of()
        members = tuple(Detector.around(one.build(place), one, DetectorSettings(**own)) for one in checkpoints)
        limits = {name: getattr(settings, name) for name in OverlapSettings.model_fields}
        if parents == "expand":
            limits["expand_predictions"] = True
        return MergedDetector(merged, members, changed(merged.join, limits), settings.score_threshold)

    @property
    def taxonomy(self) -> Taxonomy:
        """The classes of all members."""
        return self.merged.taxonomy

    def detect(
        self,
        images: AnnotationIndex,
        *,
        after_batch: Callable[[int], None] = lambda images: None,
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> Detections:
        """As :meth:`Detector.detect`, member after member; an image counts as done in parts, and is bad once."""
        batches, bad = _CountedOnce(after_batch, len(self.members)), set[str]()

        def first_time(image: BadImage) -> None:
            if image.image_id not in bad and on_bad_image is not None:
                bad.add(image.image_id)
                on_bad_image(image)

        refused = None if on_bad_image is None else first_time
        return self._joined(
            [member.detect(images, after_batch=batches.add, on_bad_image=refused) for member in self.members]
        )

    def detect_file(self, data: NDArray[np.uint8], size: tuple[int, int]) -> Detections:
        """As :meth:`Detector.detect_file`."""
        return self._joined([member.detect_file(data, size) for member in self.members])

    def _joined(self, parts: Sequence[Detections]) -> Detections:
        calibrated = [
            apply_calibrators(found, member.calibrators)
            for found, member in zip(parts, self.merged.members, strict=True)
        ]
        found = merge_detections(calibrated, self.merged.classes, self.taxonomy, self.join)
        return found.take(found.score >= self.score_threshold)


class _CountedOnce:
    """Counts images that each of several models has seen: so many parts make one image."""

    def __init__(self, report: Callable[[int], None], parts: int) -> None:
        self._report, self._parts, self._seen = report, parts, 0

    def add(self, images: int) -> None:
        """Report what is done since the last call, 0 images too, so that a stop is noticed."""
        before, self._seen = self._seen // self._parts, self._seen + images
        self._report(self._seen // self._parts - before)


def _buckets(
    trained: AspectBuckets, image_size: int | Literal["trained"], sizes: NDArray[np.integer] | None
) -> AspectBuckets:
    if image_size == "trained":
        return trained
    if sizes is None:
        raise ValueError(f"sizes of the images must be given with image_size={image_size}, but got none")
    return AspectBuckets.fit(np.asarray(sizes), image_size=image_size, num_buckets=len(trained.shapes))


def _batches(index: AnnotationIndex, buckets: AspectBuckets, batch_size: int) -> Iterator[PlannedBatch]:
    """Unlike those of training, batches are not filled up with images of other buckets, which would change shape."""
    bucket = buckets.assign(np.asarray(index.sizes))
    for number, shape in enumerate(buckets.shapes):
        images = np.flatnonzero(bucket == number)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            yield PlannedBatch(shape, part, part)


@contextmanager
def _evaluating(network: RetinaNet) -> Iterator[None]:
    """The network in evaluation mode; it returns to the mode it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
