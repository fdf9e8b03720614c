"""``convert``: data in COCO, VOC or YOLO form into the layout that ``train`` reads, and back."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.formats import coco, published, voc, yolo
from retinaflow.data.formats.checks import check
from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.image_placement import place_images, whole_folder
from retinaflow.data.formats.layout import Layout, layout_of
from retinaflow.data.formats.orientation import orientations_of
from retinaflow.data.formats.source import ClassNames, SourceSet, split_of
from retinaflow.data.formats.splits import one_sided, validation_images
from retinaflow.data.openimages import CLASS_FILES, HIERARCHY_FILES
from retinaflow.data.tables import RowError, RowErrors
from retinaflow.data.training_data import data_folder, read_split
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.runs.tracking import launched_by_mlflow, start_data_run
from retinaflow.settings.data_commands import ConvertConfig
from retinaflow.settings.groups import DataSettings
from retinaflow.settings.resolve import resolve


def run(config: ConvertConfig) -> Path:
    """Read, check, split, write. Returns the folder written."""
    quiet = not sys.stderr.isatty()
    place = data_folder(DataSettings(data=config.data))
    layout = layout_of(place) if config.source_format == "auto" else config.source_format
    target: Layout = ("coco" if layout == "openimages" else "openimages") if config.to == "auto" else config.to
    with (
        StopRequest(watch_parent=launched_by_mlflow()) as stop,
        start_data_run("convert", track=config.track, experiment=config.experiment, folder=config.output) as run,
        whole_folder(config.output) as folder,
    ):
        run.log_params({**config.model_dump(), "source_format": layout, "to": target})
        errors = RowErrors(config.on_bad_row)
        found = _read_published(config, place, target, errors) if layout == "openimages" else None
        found = found or _read_foreign(config, place, layout, errors, quiet=quiet)
        stop.check()
        found = _with_validation(found, config)
        if target == "openimages":
            found = _listed_only(found)
        place_images(_files(found, target, folder), config.image_files, quiet=quiet, after_image=stop.check)
        _write(found, target, folder, config)
        _copy_hierarchy(place if place.is_dir() else place.parent, folder)
        _report(found, errors, run, folder, config)
    report(f"written: {config.output}")
    if target == "openimages":
        report(f"next: python -m retinaflow explore --data {config.output}")
    return config.output


def _read_foreign(
    config: ConvertConfig, place: Path, layout: Layout, errors: RowErrors, *, quiet: bool
) -> DetectionSet:
    source = _source(config, place, layout, errors)
    if not source.images:
        errors.settle()
        raise ValueError(f"data={place}: at least one image is needed, but {layout} files list none")
    exhaustive = not source.federated if config.exhaustive == "auto" else config.exhaustive
    report(f"{layout}: {len(source.images):,} images, {len(source.boxes):,} boxes")
    return check(
        source,
        errors,
        exhaustive=exhaustive,
        on_bad_image=config.on_bad_image,
        orientation=config.orientation,
        report=report,
        quiet=quiet,
    )


def _source(config: ConvertConfig, place: Path, layout: Layout, errors: RowErrors) -> SourceSet:
    """What the files say."""
    folder = place.parent if place.is_file() else place
    class_list = config.classes or next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    classes = ClassNames(read_taxonomy(class_list, None) if class_list else None)
    if layout == "coco":
        files = {split_of(place.stem) or "train": place} if place.is_file() else coco.find_coco(place)
        if place.is_file() and folder.name.startswith("annotation"):
            # COCO's own layout: the images are beside the folder of the annotation files.
            folder = folder.parent
        return coco.read_coco(files, errors, folder=folder, classes=classes, images=config.images, report=report)
    if layout == "voc":
        return voc.read_voc(
            place,
            errors,
            classes=classes,
            images=config.images,
            first_pixel=config.voc_first_pixel,
            difficult=config.voc_difficult,
            report=report,
        )
    where = place if place.is_file() else yolo.find_yolo(place) or place
    return yolo.read_yolo(where, errors, classes=classes, images=config.images, report=report)


def _read_published(config: ConvertConfig, place: Path, target: Layout, errors: RowErrors) -> DetectionSet:
    given = {"images": config.images, "classes": config.classes}
    kept = {"data": str(place), "on_bad_row": config.on_bad_row, "on_bad_image": config.on_bad_image}
    settings = resolve(DataSettings, kept | {name: value for name, value in given.items() if value})
    exhaustive = settings.exhaustive if config.exhaustive == "auto" else config.exhaustive
    settings = settings.model_copy(update={"exhaustive": exhaustive})
    splits = published.splits_in(place)
    if not splits:
        raise FileNotFoundError(f"data={place} holds no *-annotations-bbox.csv")
    indexes, orientations = {}, {}
    for split in splits:
        has_labels = settings.image_labels != "none" and published.has_labels(place, split)
        loaded = read_split(settings, [split], boxes=(), image_labels=() if has_labels else None, fill_in=False)
        indexes[split] = loaded.index
        errors.found += [RowError(*row) for row in loaded.dropped.itertuples(index=False)]
        files = [loaded.index.file_of(image) for image in range(len(loaded.index))]
        orientations[split] = orientations_of(files) if target == "yolo" else [1] * len(files)
    return published.from_indexes(indexes, orientations, exhaustive=exhaustive)


def _with_validation(found: DetectionSet, config: ConvertConfig) -> DetectionSet:
    """A validation split taken out of the training split, where the source has none."""
    if "train" not in found.splits or "validation" in found.splits or config.validation_share == 0:
        return found
    image, classes = (found.boxes[name].to_numpy(dtype=np.int64) for name in ("image", "class"))
    own = np.flatnonzero(found.images["split"].to_numpy() == "train")
    is_own = np.isin(image, own)
    place, classes = np.searchsorted(own, image[is_own]), classes[is_own]
    chosen = validation_images(place, classes, len(own), share=config.validation_share, seed=config.seed)
    report(f"{int(chosen.sum()):,} of {len(own):,} images became the validation split (validation_share=0: none)")
    left = one_sided(place, classes, chosen)
    if left:
        names = ", ".join(found.taxonomy.labels[index] for index in left[:5])
        report(f"{len(left)} classes of several images could not be put on both sides: {names}")
    splits = found.images["split"].to_numpy(dtype=object)
    splits[own[chosen]] = "validation"
    return replace(found, images=found.images.assign(split=splits))


def _listed_only(found: DetectionSet) -> DetectionSet:
    """Without images of which nothing is known, as the published layout lists an image by its rows only."""
    unlisted = published.unlisted(found)
    if unlisted.any():
        report(
            f"{int(unlisted.sum()):,} images without any box or label are left out (exhaustive=true: they are empty)"
        )
    return found.take(~unlisted)


def _files(found: DetectionSet, target: Layout, folder: Path) -> list[tuple[Path, Path]]:
    """Where each image file comes from and goes to."""
    places = {"openimages": "images", "coco": "{}", "voc": "JPEGImages", "yolo": "images/{}"}
    folders = [folder / places[target].format(coco.SHORT.get(split, split)) for split in found.images["split"]]
    return [
        (source, folder / name) for source, folder, name in zip(found.files, folders, found.file_names, strict=True)
    ]


def _write(found: DetectionSet, target: Layout, folder: Path, config: ConvertConfig) -> None:
    """The annotation files of a layout; what it cannot hold is told."""
    unplaced = 0 if target in ("openimages", "coco") or found.exhaustive else int((~found.labels["present"]).sum())
    flags = found.boxes[list(FLAGS)].astype(int).sum()
    lost = {
        "verified absent classes": unplaced,
        "classes verified present without a box": 0 if target == "openimages" else _present_unboxed(found),
        "group-of flags": flags["group_of"] if target == "yolo" else 0,
        "occluded and truncated flags": flags["occluded"] + flags["truncated"] if target == "yolo" else 0,
        "depiction and inside flags": flags["depiction"] + flags["inside"] if target in ("voc", "yolo") else 0,
    }
    for what, count in lost.items():
        if count:
            report(f"{target} has no place for {what}: {count:,} are lost")
    if target == "openimages":
        published.write_published(found, folder)
    elif target == "coco":
        coco.write_coco(found, folder, found.file_names)
    elif target == "voc":
        voc.write_voc(found, folder, found.file_names, first_pixel=config.voc_first_pixel)
        published.write_classes(found.taxonomy, folder)
    else:
        yolo.write_yolo(found, folder)
        published.write_classes(found.taxonomy, folder)


def _present_unboxed(found: DetectionSet) -> int:
    """Labels of presence that no box repeats."""
    present = found.labels[found.labels["present"].astype(bool)]
    boxed = set(zip(found.boxes["image"], found.boxes["class"], strict=True))
    return sum(pair not in boxed for pair in zip(present["image"], present["class"], strict=True))


def _copy_hierarchy(place: Path, folder: Path) -> None:
    """The tree of classes goes along in every layout: the ids that it names do, too."""
    for name in HIERARCHY_FILES:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)


def _report(found: DetectionSet, errors: RowErrors, run: Run, folder: Path, config: ConvertConfig) -> None:
    """What was written, and what was left out on the way."""
    summary = found.summary()
    report(summary.to_string(index=False))
    counts = ("images", "boxes")
    metrics = {f"convert/{row.split}_{name}": getattr(row, name) for row in summary.itertuples() for name in counts}
    run.log_metrics(metrics, step=0)
    run.log_csv(summary, "summary.csv")
    if errors.found:
        errors.frame().to_csv(folder / "dropped.csv", index=False)
        run.log_csv(errors.frame(), "dropped.csv")
        report(f"{len(errors.found):,} boxes or images were left out; dropped.csv in {config.output} lists them")
