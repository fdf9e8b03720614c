"""Settings -> data: the indexes to train and evaluate on, their bins, and the plan of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.cache import LoadedIndex, cache_folder, load_index, share_index
from retinaflow.data.class_groups import SeenImages, limit_background, select_classes
from retinaflow.data.formats.recognition import conversion_hint
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.image_class_pairs import ImageClassPairs, image_class_pairs
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.known_classes import with_absent_labels
from retinaflow.data.openimages import (
    MissingAnnotationsError,
    SourceFiles,
    find_files,
    has_boxes,
    read_image_ids,
    split_names,
)
from retinaflow.data.sampling import epoch_plan, expected_samples, first_balanced_epoch, image_weights
from retinaflow.data.tables import RowError
from retinaflow.demo.dataset import demo_is_current, write_demo
from retinaflow.errors import DataError, SettingError
from retinaflow.progress import report
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.data_settings import DataSettings, SampledDataSettings, SamplingSettings


@dataclass(frozen=True)
class TrainingData:
    """The data of a training; ``train`` and ``evaluated`` have the same classes."""

    train: AnnotationIndex
    evaluated: AnnotationIndex
    pairs: ImageClassPairs
    bins: ClassBins
    dropped: pd.DataFrame
    seen: SeenImages | None = None
    """The images that a class group is trained on; None for all classes."""
    scored_bins: ClassBins | None = None
    """Bins over which AP is averaged, if they differ from the bins of sampling."""

    @property
    def digest(self) -> str:
        """Digest of both indexes, 16 hex digits each."""
        return f"{self.train.digest[:16]}-{self.evaluated.digest[:16]}"


def demo_folder() -> Path:
    """The generated demo set, written on first use."""
    folder = cache_folder() / "demo-0"
    if not demo_is_current(folder):
        report(f"writing the demo set to {folder}")
        write_demo(folder)
    return folder


def data_folder(settings: DataSettings) -> Path:
    """The folder in which file names are looked up."""
    return demo_folder() if settings.data == "demo" else Path(settings.data)


def read_split(
    settings: DataSettings,
    splits: Sequence[str],
    *,
    with_images: bool = True,
    allow_repeats: bool = False,
    fill_in: bool = True,
    prefix: str = "",
) -> LoadedIndex:
    """The index of some splits with all classes of the class list.

    ``prefix``: of the names of the settings for boxes and image-level labels, in errors. ``allow_repeats``: repeated
    boxes are kept. ``fill_in``: the absent classes of an exhaustive set are entered as labels for an evaluation, one
    for every class on every image; otherwise the index only notes that all classes are known.
    """
    folder = data_folder(settings)
    files = _found_files(settings, folder, splits, prefix)
    with_images = with_images or (files.list_other_images and has_images(settings, splits))
    images = image_folders(settings, folder, splits) if with_images else []
    loaded = load_index(
        files,
        images,
        image_sizes=settings.size_table,
        on_bad_row=settings.on_bad_row,
        on_bad_image=settings.on_bad_image,
        allow_repeats=allow_repeats,
        report=report,
    )
    if len(loaded.index) == 0 and with_images:
        broken = int(loaded.dropped["rows"].sum())
        why = (
            f"none of {broken:,} rows keeps the rules ({RowError(*loaded.dropped.iloc[0])})" if broken else "have none"
        )
        raise DataError(f"{', '.join(map(str, files.boxes))}: the files must have at least one row, but {why}")
    if settings.exhaustive:
        index = with_absent_labels(loaded.index) if fill_in else replace(loaded.index, all_known=True)
        return replace(loaded, index=index)
    if not files.image_labels:
        report(
            "no image-level labels: on each image only boxed classes count as known (give exhaustive=true if every "
            "object has a box)"
        )
    return loaded


def _found_files(settings: DataSettings, folder: Path, splits: Sequence[str], prefix: str) -> SourceFiles:
    hierarchy = settings.hierarchy
    try:
        return find_files(
            folder,
            splits,
            boxes=settings.boxes,
            image_labels=settings.label_files,
            classes=settings.classes,
            hierarchy=Path(hierarchy) if hierarchy not in (None, "auto") else None,
            use_hierarchy=hierarchy is not None,
            prefix=prefix,
        )
    except MissingAnnotationsError:
        hint = None if settings.boxes or has_boxes(folder) else conversion_hint(folder)
        if hint is None:
            raise
        raise MissingAnnotationsError(hint) from None


def image_folders(settings: DataSettings, folder: Path, splits: Sequence[str]) -> list[Path]:
    """The folders with the images of some splits. Raises DataError when there is none."""
    if settings.images:
        return list(settings.images)
    candidates = _image_candidates(folder, splits)
    found = [path for path in candidates if path.is_dir()]
    if not found:
        raise DataError(f"{folder} holds no folder {' or '.join(p.name for p in candidates)}; give it as images=")
    return found


def _image_candidates(folder: Path, splits: Sequence[str]) -> list[Path]:
    """``images``, and for each split ``images/SPLIT`` and ``SPLIT`` (where FiftyOne has ``SPLIT/data``)."""
    words = [word for split in splits for word in split_names(split)]
    return [folder / "images", *(base / word for word in words for base in (folder / "images", folder))]


def has_images(settings: DataSettings, splits: Sequence[str]) -> bool:
    """Whether a folder of images is given or found."""
    return bool(settings.images) or any(path.is_dir() for path in _image_candidates(data_folder(settings), splits))


def load_training_data(settings: SampledDataSettings, *, need_images: bool = True) -> TrainingData:
    """Read, split and select: everything between the published files and the sampler.

    With ``need_images=False`` annotations are enough where no folder of images is found.
    """
    with_images = need_images or has_images(settings, [*settings.train_splits, settings.eval_split])
    if not with_images:
        report("no folder of images: the counts are those of the annotations")
    loaded = read_split(settings, settings.train_splits, with_images=with_images, fill_in=False)
    train, evaluated, dropped = _split(settings, loaded, with_images=with_images)
    expand = settings.parents != "ignore"
    seen = None
    if settings.class_group != "all":
        all_bins = _bins(settings, image_class_pairs(train, expand=expand))
        classes = select_classes(settings.class_group, train.taxonomy, all_bins)
        train, evaluated = train.with_classes(classes), evaluated.with_classes(classes)
        train, _, seen = limit_background(train, ratio=settings.background_ratio, seed=settings.seed)
        report(f"class_group={settings.class_group}: {len(classes)} classes; {seen}")
    pairs = image_class_pairs(train, expand=expand)
    bins = _bins(settings, pairs)
    report(
        f"{len(train):,} training images, {len(train.boxes):,} boxes; {len(evaluated):,} images to evaluate on; "
        f"{train.num_classes} classes in {bins.num_bins} bins"
        + (f"; {len(bins.empty_classes)} classes without a training image" if len(bins.empty_classes) else "")
    )
    return TrainingData(share_index(train), share_index(evaluated), pairs, bins, dropped, seen)


def _split(
    settings: SampledDataSettings, loaded: LoadedIndex, *, with_images: bool
) -> tuple[AnnotationIndex, AnnotationIndex, pd.DataFrame]:
    whole = loaded.index
    if settings.eval_ids is not None:
        listed = read_image_ids(settings.eval_ids)
        chosen = np.isin(whole.image_ids, listed)
        if not chosen.any() or chosen.all():
            raise SettingError(
                f"eval_ids={settings.eval_ids}: the list must name some but not all training images, but names "
                f"{chosen.sum():,} of {len(whole):,}"
            )
        unknown = np.setdiff1d(listed, whole.image_ids)
        if len(unknown):
            report(
                f"eval_ids={settings.eval_ids}: {len(unknown):,} of {len(listed):,} ids are of no training image and "
                f"are left out, {unknown[0]} for example"
            )
        held_out = whole.take(np.flatnonzero(chosen))
        if held_out.all_known:
            held_out = with_absent_labels(held_out)
        return whole.take(np.flatnonzero(~chosen)), held_out, loaded.dropped
    none = () if settings.label_files is not None else "none"
    files = {"boxes": settings.eval_boxes, "image_labels": settings.eval_image_labels or none}
    own = settings.model_copy(update=files)
    evaluated = read_split(own, [settings.eval_split], with_images=with_images, prefix="eval_")
    shared = np.intersect1d(whole.image_ids, evaluated.index.image_ids)
    if len(shared):
        raise DataError(
            f"an image must not be in the training and in the evaluation, but {len(shared):,} are in both "
            f"{','.join(settings.train_splits)} and {settings.eval_split}, {shared[0]} for example"
        )
    return whole, evaluated.index, pd.concat([loaded.dropped, evaluated.dropped], ignore_index=True)


def _bins(settings: SampledDataSettings, pairs: ImageClassPairs) -> ClassBins:
    return make_bins(pairs, num_bins=settings.num_bins, strategy=settings.bin_strategy, edges=settings.bin_edges)


def epoch_length(settings: SamplingSettings, data: TrainingData) -> int:
    """Images per epoch; 0 in the settings means all training images once."""
    return settings.epoch_length or len(data.train)


def plans(settings: TrainConfig, data: TrainingData) -> Callable[[int], NDArray[np.int64]]:
    """The plan of each epoch: uniform up to ``balance_start``, then by the sampling strategy."""
    length = epoch_length(settings, data)
    uniform = expected_samples(np.ones(len(data.train)), length, max_repeats=max(settings.max_repeats, length))
    weights = image_weights(settings.sampling, data.pairs, data.bins, settings)
    balanced = expected_samples(weights, length, max_repeats=settings.max_repeats)
    balanced_from = first_balanced_epoch(settings.epochs, balance_start=settings.balance_start)

    def plan(epoch: int) -> NDArray[np.int64]:
        return epoch_plan(uniform if epoch < balanced_from else balanced, seed=settings.seed, epoch=epoch)

    return plan
