"""The steps of ``convert``: the files of one layout -> :class:`DetectionSet` -> the files of another layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.formats import coco, published, voc, yolo
from retinaflow.data.formats.checks import check
from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import split_of
from retinaflow.data.formats.orientation import orientations_of
from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.formats.splits import one_sided, validation_images
from retinaflow.data.openimages import CLASS_FILES, HIERARCHY_FILES
from retinaflow.data.tables import RowError, RowErrors
from retinaflow.data.training_data import read_split
from retinaflow.errors import DataError
from retinaflow.progress import report
from retinaflow.settings.data_commands import ConvertConfig, FirstPixel, Layout
from retinaflow.settings.groups import DataSettings
from retinaflow.settings.resolve import resolve


def read_set(
    config: ConvertConfig, path: Path, layout: Layout, target: Layout, errors: RowErrors, *, quiet: bool
) -> DetectionSet:
    """The set in a file or folder ``path`` of a layout, verified against its image files.

    Raises DataError for a file that breaks a rule; rows that break one go to ``errors``.
    """
    if layout == "openimages":
        return _read_published(config, path, target, errors)
    source = _read_source(config, path, layout, errors)
    if not source.images:
        errors.settle()
        raise DataError(f"data={path}: the {layout} files must list at least one image, but list none")
    report(f"{layout}: {len(source.images):,} images, {len(source.boxes):,} boxes")
    return check(
        source,
        errors,
        exhaustive=not source.federated if config.exhaustive == "auto" else config.exhaustive,
        on_bad_image=config.on_bad_image,
        orientation=config.orientation,
        report=report,
        quiet=quiet,
    )


def _read_source(config: ConvertConfig, path: Path, layout: Layout, errors: RowErrors) -> SourceSet:
    folder = path.parent if path.is_file() else path
    class_list = config.classes or next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    classes = ClassNames(read_taxonomy(class_list, None) if class_list else None)
    if layout == "coco":
        files = {split_of(path.stem) or "train": path} if path.is_file() else coco.find_coco(path)
        if path.is_file() and folder.name.startswith("annotation"):
            # COCO's own layout: the images are beside the folder of the annotation files.
            folder = folder.parent
        return coco.read_coco(files, errors, folder=folder, classes=classes, images=config.images, report=report)
    if layout == "voc":
        return voc.read_voc(
            path,
            errors,
            classes=classes,
            images=config.images,
            first_pixel=config.voc_first_pixel,
            difficult=config.voc_difficult,
            report=report,
        )
    document = path if path.is_file() else yolo.find_yolo(path) or path
    return yolo.read_yolo(document, errors, classes=classes, images=config.images, report=report)


def _read_published(config: ConvertConfig, folder: Path, target: Layout, errors: RowErrors) -> DetectionSet:
    given = {"images": config.images, "classes": config.classes}
    rules = {"data": str(folder), "on_bad_row": config.on_bad_row, "on_bad_image": config.on_bad_image}
    settings = resolve(DataSettings, rules | {name: value for name, value in given.items() if value})
    exhaustive = settings.exhaustive if config.exhaustive == "auto" else config.exhaustive
    settings = settings.model_copy(update={"exhaustive": exhaustive})
    splits = published.splits_in(folder)
    if not splits:
        raise DataError(f"data={folder}: the folder must hold a *-annotations-bbox.csv, but holds none")
    indexes, orientations = {}, {}
    for split in splits:
        has_labels = settings.image_labels != "none" and published.has_labels(folder, split)
        loaded = read_split(settings, [split], boxes=(), image_labels=() if has_labels else None, fill_in=False)
        indexes[split] = loaded.index
        errors.found += [RowError(*row) for row in loaded.dropped.itertuples(index=False)]
        files = [loaded.index.file_of(image) for image in range(len(loaded.index))]
        # Only YOLO's boxes depend on the orientation, and reading it opens every file.
        orientations[split] = orientations_of(files) if target == "yolo" else [1] * len(files)
    return published.from_indexes(indexes, orientations, exhaustive=exhaustive)


def with_validation_split(found: DetectionSet, *, fraction: float, seed: int) -> DetectionSet:
    """The set with a validation split, taken from the training split if there is none; as it is with ``fraction`` 0."""
    if "train" not in found.splits or "validation" in found.splits or fraction == 0:
        return found
    image, classes = (found.boxes[name].to_numpy(dtype=np.int64) for name in ("image", "class"))
    own = np.flatnonzero(found.images["split"].to_numpy() == "train")
    is_own = np.isin(image, own)
    position, classes = np.searchsorted(own, image[is_own]), classes[is_own]
    chosen = validation_images(position, classes, len(own), fraction=fraction, seed=seed)
    report(f"{int(chosen.sum()):,} of {len(own):,} images became the validation split (validation_fraction=0: none)")
    left = one_sided(position, classes, chosen)
    if left:
        names = ", ".join(found.taxonomy.labels[index] for index in left[:5])
        report(f"{len(left)} classes of several images could not be put into both splits: {names}")
    splits = found.images["split"].to_numpy(dtype=object)
    splits[own[chosen]] = "validation"
    return replace(found, images=found.images.assign(split=splits))


def without_unknown_images(found: DetectionSet) -> DetectionSet:
    """The set without images that have no box and no label: the published layout lists an image by its rows only."""
    unknown = published.unknown_images(found)
    if unknown.any():
        report(
            f"{int(unknown.sum()):,} images without any box or label are left out (with exhaustive=true they count as "
            "images without objects)"
        )
    return found.take(~unknown)


def image_paths(found: DetectionSet, target: Layout, folder: Path) -> list[tuple[Path, Path]]:
    """(source, target) of each image file of a set that is written to ``folder``."""
    parts = {"openimages": "images", "coco": "{}", "voc": "JPEGImages", "yolo": "images/{}"}
    folders = [folder / parts[target].format(coco.SHORT.get(split, split)) for split in found.images["split"]]
    return [
        (source, folder / name) for source, folder, name in zip(found.files, folders, found.file_names, strict=True)
    ]


def write_annotations(found: DetectionSet, target: Layout, folder: Path, *, first_pixel: FirstPixel) -> None:
    """Write the annotation files of a layout, and report what the layout cannot hold."""
    for what, count in _lost(found, target).items():
        if count:
            report(f"{target} cannot hold {what}: {count:,} are lost")
    if target == "openimages":
        published.write_published(found, folder)
    elif target == "coco":
        coco.write_coco(found, folder, found.file_names)
    elif target == "voc":
        voc.write_voc(found, folder, found.file_names, first_pixel=first_pixel)
        published.write_classes(found.taxonomy, folder)
    else:
        yolo.write_yolo(found, folder)
        published.write_classes(found.taxonomy, folder)


def _lost(found: DetectionSet, target: Layout) -> dict[str, int]:
    has_absent = target in ("openimages", "coco") or found.exhaustive
    flags = found.boxes[list(FLAGS)].astype(int).sum()
    return {
        "verified absent classes": 0 if has_absent else int((~found.labels["present"]).sum()),
        "classes verified present without a box": 0 if target == "openimages" else _present_without_box(found),
        "group-of flags": flags["group_of"] if target == "yolo" else 0,
        "occluded and truncated flags": flags["occluded"] + flags["truncated"] if target == "yolo" else 0,
        "depiction and inside flags": flags["depiction"] + flags["inside"] if target in ("voc", "yolo") else 0,
    }


def _present_without_box(found: DetectionSet) -> int:
    present = found.labels[found.labels["present"].astype(bool)]
    boxed = set(zip(found.boxes["image"], found.boxes["class"], strict=True))
    return sum(pair not in boxed for pair in zip(present["image"], present["class"], strict=True))


def copy_hierarchy(path: Path, folder: Path) -> None:
    """Copy the class hierarchy beside ``path``, if there is one: every layout keeps the class ids that it names."""
    source = path if path.is_dir() else path.parent
    for name in HIERARCHY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
