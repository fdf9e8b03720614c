"""Which other layouts a folder looks like, for ``convert`` and for the hint of commands that cannot read them."""

from __future__ import annotations

from pathlib import Path

from retinaflow.data.formats.coco_files import find_coco
from retinaflow.data.formats.voc import has_voc
from retinaflow.data.formats.yolo import find_yolo, has_labels
from retinaflow.errors import DataError
from retinaflow.settings.conversion_settings import Layout

NAMES: dict[Layout, str] = {"coco": "COCO JSON", "voc": "Pascal VOC XML", "yolo": "YOLO labels"}


def other_layouts(folder: Path) -> list[Layout]:
    """The layouts other than the published one of which a folder holds annotation files.

    Raises DataError for files of a layout that contradict each other.
    """
    found: list[Layout] = []
    if find_coco(folder):
        found.append("coco")
    if has_voc(folder):
        found.append("voc")
    evidence = find_yolo(folder)
    # Class names alone may belong to any layout.
    if evidence is not None and (not found or evidence != folder or has_labels(folder)):
        found.append("yolo")
    return found


def conversion_hint(folder: Path) -> str | None:
    """For a folder without published annotations: what it holds instead and the command that converts it, or None.

    ``found COCO JSON in data: convert it first: python -m retinaflow convert --data data --output data-converted``
    """
    try:
        found = other_layouts(folder) if folder.is_dir() else []
    except (DataError, OSError):
        # The conversion itself names what is wrong with the files.
        return None
    if not found:
        return None
    names = " and ".join(NAMES[layout] for layout in found)
    return (
        f"found {names} in {folder}: convert it first: python -m retinaflow convert --data {folder} --output "
        f"{folder.with_name(f'{folder.resolve().name}-converted')}"
    )
