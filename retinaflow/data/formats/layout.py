"""Which layout a folder or file has, told from what is in it."""

from __future__ import annotations

from pathlib import Path

from retinaflow.data.formats.coco import find_coco
from retinaflow.data.formats.published import splits_in
from retinaflow.data.formats.voc import has_voc
from retinaflow.data.formats.yolo import find_yolo
from retinaflow.settings.data_commands import Layout


def layout_of(place: Path) -> Layout:
    """Raises FileNotFoundError where there is nothing, and ValueError where it looks like none or several."""
    if place.is_file():
        kinds: dict[str, Layout] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        if place.suffix.lower() in kinds:
            return kinds[place.suffix.lower()]
        raise ValueError(f"data={place}: a file must be COCO's .json or YOLO's .yaml; else give the folder")
    if not place.is_dir():
        raise FileNotFoundError(f"data={place}: no such file or folder")
    if splits_in(place):
        return "openimages"
    found: list[Layout] = []
    if find_coco(place):
        found.append("coco")
    if has_voc(place):
        found.append("voc")
    if find_yolo(place):
        found.append("yolo")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"data={place} looks like {' and '.join(found)}; say which as source_format=")
    raise ValueError(
        f"data={place}: found neither COCO JSON files, nor VOC XML files, nor YOLO's data.yaml or labels, nor "
        "*-annotations-bbox.csv; is it the right folder?"
    )
