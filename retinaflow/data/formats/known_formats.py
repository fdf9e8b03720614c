"""Layouts of detection data: the one of a folder, recognised by its content, and reading and writing each of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.formats.coco import read_coco
from retinaflow.data.formats.coco_files import find_coco
from retinaflow.data.formats.coco_writer import write_coco
from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import short_name
from retinaflow.data.formats.published import splits_in
from retinaflow.data.formats.published_writer import write_classes, write_published
from retinaflow.data.formats.recognition import other_layouts
from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.formats.voc import read_voc
from retinaflow.data.formats.voc_writer import write_voc
from retinaflow.data.formats.yolo import find_yolo, read_yolo
from retinaflow.data.formats.yolo_writer import write_yolo
from retinaflow.data.openimages import CLASS_FILES
from retinaflow.data.tables import RowErrors
from retinaflow.errors import SettingError
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig, FirstPixel, Layout


def layout_of(path: Path) -> Layout:
    """The layout of a data folder or file. Raises SettingError for one that is missing or looks like none or
    several."""
    if path.is_file():
        kinds: dict[str, Layout] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".data": "yolo"}
        if path.suffix.lower() in kinds:
            return kinds[path.suffix.lower()]
        raise SettingError(f"data={path}: a file must be COCO's .json or YOLO's .yaml; else give the folder")
    if not path.is_dir():
        raise SettingError(f"data={path}: no such file or folder")
    if splits_in(path):
        return "openimages"
    found = other_layouts(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingError(f"data={path} looks like {' and '.join(found)}; give one of them as source_format=")
    raise SettingError(
        f"data={path}: found neither COCO JSON files, nor VOC XML files, nor YOLO's data.yaml or labels, nor "
        "*-annotations-bbox.csv; check the folder"
    )


def read_source(config: ConvertConfig, path: Path, layout: Layout, errors: RowErrors) -> SourceSet:
    """The content of the files of a layout other than that of Open Images, not yet verified against the image files.

    Raises DataError for a file that cannot be read; rows that break a rule go to ``errors``.
    """
    folder = path.parent if path.is_file() else path
    class_list = config.classes or next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    classes = ClassNames(read_taxonomy(class_list, None) if class_list else None)
    if layout == "coco":
        files = find_coco(path)
        if path.is_file() and folder.name.startswith("annotation"):
            # COCO's own layout: the images are beside the folder of the annotation files.
            folder = folder.parent
        return read_coco(config, files, errors, folder=folder, classes=classes)
    if layout == "voc":
        return read_voc(config, path, errors, classes=classes)
    document = path if path.is_file() else find_yolo(path) or path
    return read_yolo(config, document, errors, classes=classes)


def image_paths(found: DetectionSet, target: Layout, folder: Path) -> list[tuple[Path, Path]]:
    """(source, target) of each image file of a set that is written to ``folder``."""
    parts = {"openimages": "images", "coco": "{}", "voc": "JPEGImages", "yolo": "images/{}"}
    folders = [folder / parts[target].format(short_name(split)) for split in found.images["split"]]
    return [
        (source, folder / name) for source, folder, name in zip(found.files, folders, found.file_names, strict=True)
    ]


def write_annotations(found: DetectionSet, target: Layout, folder: Path, *, first_pixel: FirstPixel) -> None:
    """Write the annotation files of a layout, and report what the layout cannot hold."""
    for what, count in _lost(found, target).items():
        if count:
            report(f"{target} cannot hold {what}: {count:,} are lost")
    if target == "openimages":
        write_published(found, folder)
    elif target == "coco":
        write_coco(found, folder, found.file_names)
    elif target == "voc":
        write_voc(found, folder, found.file_names, first_pixel=first_pixel)
        write_classes(found.taxonomy, folder)
    else:
        write_yolo(found, folder)
        write_classes(found.taxonomy, folder)


def _lost(found: DetectionSet, target: Layout) -> dict[str, int]:
    has_absent = target in ("openimages", "coco") or found.exhaustive
    flags = found.boxes[list(FLAGS)].astype(int).sum()
    return {
        "verified absent classes": 0 if has_absent else int((~found.labels["present"]).sum()),
        "classes of which some objects have no box": _incomplete(found, target),
        "classes verified present without a box": 0 if target == "openimages" else _present_without_box(found),
        "group-of flags": flags["group_of"] if target == "yolo" else 0,
        "occluded and truncated flags": flags["occluded"] + flags["truncated"] if target == "yolo" else 0,
        "depiction and inside flags": flags["depiction"] + flags["inside"] if target in ("voc", "yolo") else 0,
    }


def _incomplete(found: DetectionSet, target: Layout) -> int:
    """The published layout holds those that are boxed, as a flag of the boxes."""
    if target != "openimages":
        return len(found.incomplete) if target != "coco" else 0
    return len(_without_box(found, found.incomplete))


def _present_without_box(found: DetectionSet) -> int:
    return len(_without_box(found, found.labels[found.labels["present"].astype(bool)]))


def _without_box(found: DetectionSet, pairs: pd.DataFrame) -> pd.DataFrame:
    """Those (image, class) of ``pairs`` that have no box."""
    boxed, asked = (frame["image"] * len(found.taxonomy) + frame["class"] for frame in (found.boxes, pairs))
    return pairs[~asked.isin(boxed)]
