"""The layout of a folder or file, recognised by its content."""

from __future__ import annotations

from pathlib import Path

from retinaflow.data.formats.coco import find_coco
from retinaflow.data.formats.published import splits_in
from retinaflow.data.formats.voc import has_voc
from retinaflow.data.formats.yolo import find_yolo
from retinaflow.errors import SettingError
from retinaflow.settings.data_commands import Layout


def layout_of(path: Path) -> Layout:
    """The layout of a data folder or file. Raises SettingError for one that is missing or looks like none or
    several."""
    if path.is_file():
        kinds: dict[str, Layout] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        if path.suffix.lower() in kinds:
            return kinds[path.suffix.lower()]
        raise SettingError(f"data={path}: a file must be COCO's .json or YOLO's .yaml; else give the folder")
    if not path.is_dir():
        raise SettingError(f"data={path}: no such file or folder")
    if splits_in(path):
        return "openimages"
    found: list[Layout] = []
    if find_coco(path):
        found.append("coco")
    if has_voc(path):
        found.append("voc")
    if find_yolo(path):
        found.append("yolo")
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingError(f"data={path} looks like {' and '.join(found)}; give one of them as source_format=")
    raise SettingError(
        f"data={path}: found neither COCO JSON files, nor VOC XML files, nor YOLO's data.yaml or labels, nor "
        "*-annotations-bbox.csv; check the folder"
    )
