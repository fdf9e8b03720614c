"""Settings -> the images to detect on: those of a folder, of a list of ids or paths, or of a split of a data set.

No class list and no box is read. Images are in the order of their ids, which are the file names without suffix;
two files of one id are refused. Images without a readable file are listed apart (``on_bad_image=skip``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.cache import size_journal
from retinaflow.data.id_columns import read_image_sizes
from retinaflow.data.image_folders import OTHER_SUFFIXES, SUFFIXES, images_under, locate_files
from retinaflow.data.image_sizes import SizeTable
from retinaflow.data.images import BadImage, attach_sizes
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import (
    MissingAnnotationsError,
    is_plain_id,
    lists_other_images,
    read_image_ids,
    split_image_ids,
)
from retinaflow.data.tables import RowError, RowErrors, errors_frame
from retinaflow.data.text_lines import read_lines
from retinaflow.data.training_data import data_folder, image_folders, load_training_data, read_split
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.progress import report
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.data_settings import DataSettings
from retinaflow.settings.model_settings import ImagesSettings
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy


@dataclass(frozen=True)
class WantedImages:
    """``index``: the readable images, with the model's classes and no annotation. ``unreadable``: the others."""

    index: AnnotationIndex
    unreadable: list[BadImage]

    def __len__(self) -> int:
        return len(self.index) + len(self.unreadable)

    @property
    def unreadable_table(self) -> pd.DataFrame:
        """Columns file, line, rule, value, as of every list of what was left out."""
        rule = "an image must have a readable file"
        rows = [RowError(image.image_id, 0, rule, image.reason) for image in self.unreadable]
        return errors_frame(rows)


def wanted_images(
    config: ImagesSettings,
    taxonomy: Taxonomy,
    trained: Mapping[str, Any],
    *,
    choose: Callable[[NDArray[np.str_]], NDArray[np.str_]] = lambda ids: ids,
) -> WantedImages:
    """The images of the settings. ``trained``: settings of the model's training, for ``data=trained``.

    ``choose`` some of the ids before any file is opened.

    Raises SettingError for a folder, list or split that does not exist, and DataError naming the file or the line of
    the list.
    """
    found, searched = _found(config, trained)
    if not found:
        raise DataError(f"at least one image is needed, but there is none in {searched}")
    ids = choose(np.array(sorted(found), dtype=np.str_))
    files = [found[image_id] for image_id in ids.tolist()]
    root = Path(os.path.commonpath([path.parent for path in files if path is not None] or [Path.cwd()]))
    index = replace(
        _bare(ids, taxonomy),
        files=np.array(["" if path is None else os.path.relpath(path, root) for path in files], dtype=np.str_),
        images_folder=str(root),
    )
    sizes = config.size_table or (trained.get("size_table") if _is_trained(config) else None)
    given = SizeTable(*read_image_sizes(Path(sizes), RowErrors("stop"))) if sizes else None
    index, bad = attach_sizes(
        index, searched, on_bad_image=config.on_bad_image, given=given, journal=size_journal([root])
    )
    return WantedImages(index, bad)


def _found(config: ImagesSettings, trained: Mapping[str, Any]) -> tuple[dict[str, Path | None], str]:
    """Image id -> its file, absolute (None: there is none), and the name of the folders that were searched."""
    if config.image_list is not None:
        return _listed(config.image_list, config, trained)
    if config.images:
        searched = " or ".join(map(str, config.images))
        return _unique((path.stem, path) for folder in config.images for path in images_under(folder)), searched
    settings, splits = _data(config, trained)
    folders = image_folders(settings, data_folder(settings), splits)
    searched = " or ".join(map(str, folders))
    ids = _ids_of_splits(settings, splits, trained if is_evaluated(config, trained) else {})
    if len(ids) == 0:
        own = [folder for folder in folders if folder.name in splits]
        if not own:
            raise SettingError(
                f"split={splits[0]}: {data_folder(settings)} has neither annotations of it nor a folder of its images; "
                "give a folder as images=, or a file of ids or paths as image_list="
            )
        return _unique((path.stem, path) for folder in own for path in images_under(folder)), searched
    found = _looked_up(ids.tolist(), folders)
    if any(lists_other_images(data_folder(settings), split) for split in splits):
        found = {image_id: path for image_id, path in found.items() if path is not None}
    return found, searched


def _ids_of_splits(settings: DataSettings, splits: Sequence[str], trained: Mapping[str, Any]) -> NDArray[np.str_]:
    """The ids that annotations name; ``trained``: settings of the training whose evaluated images are wanted."""
    boxes, labels = settings.boxes, settings.label_files
    if trained and trained.get("eval_ids") is None:
        boxes, eval_labels = (tuple(map(Path, trained[name])) for name in ("eval_boxes", "eval_image_labels"))
        labels = eval_labels or (None if labels is None else ())
    ids = split_image_ids(data_folder(settings), splits, boxes=boxes, image_labels=labels)
    eval_ids = trained.get("eval_ids")
    return ids if eval_ids is None else np.intersect1d(ids, read_image_ids(Path(eval_ids)))


def _data(config: ImagesSettings, trained: Mapping[str, Any]) -> tuple[DataSettings, tuple[str, ...]]:
    """The settings of the data that is split, and the names of the splits."""
    if not _is_trained(config):
        return DataSettings(data=config.data), (config.split,)
    own = settings_of_training(trained)
    settings = DataSettings(**{name: getattr(own, name) for name in DataSettings.model_fields})
    if not is_evaluated(config, trained):
        return settings.model_copy(update={"boxes": ()}), (config.split,)
    return settings, (own.eval_split,) if own.eval_ids is None else own.train_splits


def known_ground_truth(
    config: ImagesSettings, taxonomy: Taxonomy, trained: Mapping[str, Any]
) -> AnnotationIndex | None:
    """The annotations of the images, with the classes of ``taxonomy``; None where there are none, as for a folder of
    images. Arguments as of :func:`wanted_images`."""
    if config.images:
        return None
    if is_evaluated(config, trained):
        return load_training_data(settings_of_training(trained)).evaluated
    # Boxes alone are shown: which classes are absent does not matter.
    data = str(trained["data"]) if config.data == "trained" else config.data
    settings = DataSettings(data=data, exhaustive=True, image_labels="none")
    try:
        index = read_split(settings, [config.split], with_images=False, allow_repeats=True, fill_in=False).index
    except MissingAnnotationsError as error:
        report(f"detections are shown without ground truth: {error}")
        return None
    known = [index.taxonomy.index_of[mid] for mid in taxonomy.ids if mid in index.taxonomy.index_of]
    return index.with_classes(np.array(known)) if len(known) < len(index.taxonomy) else index


def settings_of_training(trained: Mapping[str, Any]) -> TrainConfig:
    """The settings that a checkpoint holds. Raises SettingError for a merged model whose members were evaluated on
    images of no training."""
    if trained.get("data", "") is None:
        raise SettingError(
            "data must be given for this merged model, whose members were evaluated on images of no training, but got "
            "data=trained"
        )
    # They are complete; the YAML file that some came from may be gone.
    return resolve(TrainConfig, {**trained, "config": None})


def _is_trained(config: ImagesSettings) -> bool:
    return config.data == "trained" and not config.images


def is_evaluated(config: ImagesSettings, trained: Mapping[str, Any]) -> bool:
    """Whether the images are those that the model was evaluated on in training: no split is given, or just that one,
    of which the training has used all."""
    if not _is_trained(config):
        return False
    is_that = config.split == trained.get("eval_split") and trained.get("eval_ids") is None
    return is_that or "split" not in config.model_fields_set


def _listed(path: Path, config: ImagesSettings, trained: Mapping[str, Any]) -> tuple[dict[str, Path | None], str]:
    """A list of paths, relative to its own folder, and ids, looked up in ``images`` or the folders of the split."""
    if not path.is_file():
        raise SettingError(f"image_list={path}: no such file")
    lines = [line.strip() for line in read_lines(path)]
    is_table = bool(lines) and lines[0].split(",")[0].strip('"').lower() == "imageid"
    paths: list[tuple[str, Path | None]] = []
    ids: list[str] = []
    for number, line in enumerate(lines[1:] if is_table else lines, start=2 if is_table else 1):
        entry = line.split(",")[0].strip().strip('"') if is_table else line
        if not entry:
            continue
        if Path(entry).suffix.lower() in SUFFIXES:
            paths.append((Path(entry).stem, (path.parent / entry).absolute()))
        elif is_plain_id(entry) and Path(entry).suffix.lower() not in OTHER_SUFFIXES:
            ids.append(entry)
        else:
            raise DataError(
                f"{path.name} line {number}: an image id must be a plain file name, and a path must end in "
                f"{', '.join(SUFFIXES)}, but got {shown(entry, quotes=False)}"
            )
    found = _unique(iter(paths))
    if not ids:
        return found, str(path)
    if config.images:
        folders = list(config.images)
        wanted = set(ids)
        there = _unique((file.stem, file) for folder in folders for file in images_under(folder) if file.stem in wanted)
        by_id = {image_id: there.get(image_id) for image_id in ids}
    else:
        settings, splits = _data(config, trained)
        folders = image_folders(settings, data_folder(settings), splits)
        by_id = _looked_up(ids, folders)
    return _unique(iter([*found.items(), *by_id.items()])), " or ".join(map(str, folders))


def _looked_up(ids: Sequence[str], folders: Sequence[Path]) -> dict[str, Path | None]:
    found = locate_files(np.array(ids, dtype=np.str_), folders)
    return {image_id: found.root / file if file else None for image_id, file in zip(ids, found.files, strict=True)}


def _unique(pairs: Iterator[tuple[str, Path | None]]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {}
    for image_id, path in pairs:
        if found.setdefault(image_id, path) != path:
            raise DataError(
                f"an image id (file name without suffix) must stand for one file, but {image_id} is {found[image_id]} "
                f"and {path}; rename one, or take the folders one by one, each with an output= of its own"
            )
    return found


def _bare(ids: NDArray[np.str_], taxonomy: Taxonomy) -> AnnotationIndex:
    """An index of ids without sizes, boxes and labels."""
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    return AnnotationIndex(
        taxonomy=taxonomy,
        image_ids=ids,
        files=np.zeros(len(ids), dtype="<U1"),
        sizes=np.zeros((len(ids), 2), dtype=np.int32),
        box_start=starts,
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, dtype=np.int32),
        flags=np.zeros(0, dtype=np.uint8),
        label_start=starts,
        verified_class=np.zeros(0, dtype=np.int32),
        verified_present=np.zeros(0, dtype=bool),
    )
