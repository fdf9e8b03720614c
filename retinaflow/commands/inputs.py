"""Settings -> data: the indexes to train and judge on, their bins, and the plan of each epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.config import DataSettings, SamplingFields, SplitSettings, TrainConfig
from retinaflow.data.bins import ClassBins, make_bins
from retinaflow.data.cache import LoadedIndex, cache_folder, load_index
from retinaflow.data.demo import demo_is_current, write_demo
from retinaflow.data.groups import limit_background, select_classes
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import find_files, read_image_ids
from retinaflow.data.presence import Presence, class_presence
from retinaflow.data.sampling import (
    SamplingSettings,
    epoch_plan,
    expected_draws,
    image_weights,
    uses_uniform_plan,
)


def say(text: str) -> None:
    """A line for the user, at once even when the output goes to a file."""
    print(text, flush=True)


@dataclass(frozen=True)
class TrainingData:
    """What a training needs from disk; ``train`` and ``judged`` have the same classes."""

    train: AnnotationIndex
    judged: AnnotationIndex
    presence: Presence
    bins: ClassBins
    dropped: pd.DataFrame
    scored_bins: ClassBins | None = None
    """Bins that AP is averaged over, when they are not those that images are drawn by."""

    @property
    def digest(self) -> str:
        """Digest of both indexes, 16 hex digits each."""
        return f"{self.train.digest[:16]}-{self.judged.digest[:16]}"


def demo_folder(seed: int = 0) -> Path:
    """The generated demo set, written on first use."""
    folder = cache_folder() / f"demo-{seed}"
    if not demo_is_current(folder, seed=seed):
        say(f"writing the demo set to {folder}")
        write_demo(folder, seed=seed, progress=sys.stderr.isatty())
    return folder


def data_folder(settings: DataSettings) -> Path:
    """The folder that file names are looked up in."""
    return demo_folder() if settings.data == "demo" else Path(settings.data)


def read_split(
    settings: DataSettings,
    splits: Sequence[str],
    *,
    boxes: Sequence[Path],
    image_labels: Sequence[Path] | None,
    with_images: bool = True,
) -> LoadedIndex:
    """The index of some splits with all classes of the class list."""
    folder = data_folder(settings)
    hierarchy = settings.hierarchy
    files = find_files(
        folder,
        splits,
        boxes=boxes,
        image_labels=image_labels,
        classes=settings.classes,
        hierarchy=Path(hierarchy) if hierarchy not in (None, "auto") else None,
        use_hierarchy=hierarchy is not None,
    )
    images = _image_folders(settings, folder, splits) if with_images else []
    loaded = load_index(files, images, on_bad_row=settings.on_bad_row, on_bad_image=settings.on_bad_image, say=say)
    if len(loaded.index) == 0:
        raise ValueError(f"{', '.join(map(str, files.boxes))}: at least one row is needed, but there is none")
    if settings.exhaustive:
        return replace(loaded, index=loaded.index.exhaustive())
    if not files.image_labels:
        say("no image-level labels: on each image only boxed classes count as known (exhaustive=true if all is boxed)")
    return loaded


def _image_folders(settings: DataSettings, folder: Path, splits: Sequence[str]) -> list[Path]:
    if settings.images:
        return list(settings.images)
    candidates = [folder / "images", *(base / split for split in splits for base in (folder / "images", folder))]
    found = [path for path in candidates if path.is_dir()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no folder {' or '.join(p.name for p in candidates)}; give it as images="
        )
    return found


def load_training_data(settings: SamplingFields) -> TrainingData:
    """Read, split and select: everything between the published files and the sampler."""
    labels = None if settings.image_labels == "none" else settings.image_labels
    loaded = read_split(settings, settings.train_splits, boxes=settings.boxes, image_labels=labels)
    train, judged, dropped = _split(settings, loaded, labels)
    expand = settings.parents != "ignore"
    if settings.class_group != "all":
        all_bins = _bins(settings, class_presence(train, expand=expand))
        classes = select_classes(settings.class_group, train.taxonomy, all_bins)
        train, judged = train.with_classes(classes), judged.with_classes(classes)
        train, _ = limit_background(train, ratio=settings.background_ratio, seed=settings.seed)
    presence = class_presence(train, expand=expand)
    bins = _bins(settings, presence)
    say(
        f"{len(train):,} training images, {len(train.boxes):,} boxes; {len(judged):,} images to judge on; "
        f"{train.num_classes} classes in {bins.num_bins} bins"
        + (f"; {len(bins.empty_classes)} classes without a training image" if len(bins.empty_classes) else "")
    )
    return TrainingData(train, judged, presence, bins, dropped)


def _split(
    settings: SplitSettings, loaded: LoadedIndex, labels: Sequence[Path] | None
) -> tuple[AnnotationIndex, AnnotationIndex, pd.DataFrame]:
    whole = loaded.index
    if settings.eval_ids is not None:
        chosen = np.isin(whole.image_ids, read_image_ids(settings.eval_ids))
        if not chosen.any() or chosen.all():
            raise ValueError(
                f"eval_ids={settings.eval_ids}: some but not all training images must be listed, but {chosen.sum():,} "
                f"of {len(whole):,} are"
            )
        return whole.take(np.flatnonzero(~chosen)), whole.take(np.flatnonzero(chosen)), loaded.dropped
    eval_labels = settings.eval_image_labels if settings.eval_image_labels else (None if labels is None else ())
    judged = read_split(settings, [settings.eval_split], boxes=settings.eval_boxes, image_labels=eval_labels)
    shared = np.intersect1d(whole.image_ids, judged.index.image_ids)
    if len(shared):
        raise ValueError(
            f"images must not be trained on and judged on, but {len(shared):,} are in both "
            f"{','.join(settings.train_splits)} and {settings.eval_split}, {shared[0]} for example"
        )
    return whole, judged.index, pd.concat([loaded.dropped, judged.dropped], ignore_index=True)


def _bins(settings: SamplingFields, presence: Presence) -> ClassBins:
    return make_bins(presence, num_bins=settings.num_bins, strategy=settings.bin_strategy, edges=settings.bin_edges)


def sampling_settings(settings: SamplingFields) -> SamplingSettings:
    """The dials of the sampler among the settings."""
    return SamplingSettings(
        balance=float(settings.balance),
        background_rate=settings.background_rate,
        correction_steps=settings.correction_steps,
        repeat_threshold=settings.repeat_threshold,
        max_repeats=settings.max_repeats,
    )


def epoch_length(settings: SamplingFields, data: TrainingData) -> int:
    """Images per epoch; 0 in the settings means as many as there are."""
    return settings.epoch_length or len(data.train)


def plans(settings: TrainConfig, data: TrainingData) -> Callable[[int], NDArray[np.int64]]:
    """The plan of each epoch: uniform up to ``balance_start``, then by the sampling strategy."""
    length = epoch_length(settings, data)
    dials = sampling_settings(settings)
    uniform = expected_draws(np.ones(len(data.train)), length, max_repeats=max(settings.max_repeats, length))
    weights = image_weights(settings.sampling, data.presence, data.bins, dials)
    balanced = expected_draws(weights, length, max_repeats=settings.max_repeats)

    def plan(epoch: int) -> NDArray[np.int64]:
        assert isinstance(settings.epochs, int)
        first = uses_uniform_plan(epoch, epochs=settings.epochs, balance_start=settings.balance_start)
        return epoch_plan(uniform if first else balanced, seed=settings.seed, epoch=epoch)

    return plan
