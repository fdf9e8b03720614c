"""YOLO folders in the layout of Ultralytics <-> detection sets: a text file of labels for each image.

``data.yaml`` names the classes and the images of each split (a folder, a list of folders, or a text file of paths);
without one, ``images/{split}`` and ``labels/{split}`` with ``classes.txt`` are read. A row is ``class x y width
height``, centre and size in shares of the image, or a class and a polygon, of which the bounding box is taken. An
image without label file, or with an empty one, has no objects. Shares refer to the picture as EXIF turns it, as
Ultralytics reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.source import SPLIT_NAMES, ClassNames, SourceImage, SourceSet, note
from retinaflow.data.formats.turning import to_turned
from retinaflow.data.image_files import SUFFIXES
from retinaflow.data.tables import Faults

SHORT = {"validation": "val"}
"""How YOLO calls a split."""
_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_NO_FLAGS = (False,) * len(FLAGS)


def find_yolo(folder: Path) -> Path | None:
    """The ``data.yaml`` of a folder, the folder itself where it has images and labels, or None."""
    documents = [path for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if _is_yolo(path)]
    if len(documents) > 1:
        raise ValueError(f"{folder}: which is it, {documents[0].name} or {documents[1].name}? Give the file as data=")
    if documents:
        return documents[0]
    has_labels = any((folder / part).is_dir() for part in ("labels", "train/labels"))
    return folder if has_labels or any((folder / name).is_file() for name in _NAME_FILES) else None


def _is_yolo(path: Path) -> bool:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(document, dict) and "names" in document and "train" in document


def read_yolo(place: Path, faults: Faults, *, classes: ClassNames, images: Sequence[Path] = ()) -> SourceSet:
    """A ``data.yaml`` or a folder without one; ``images``: folders of images instead of those it names (all train).

    Raises ValueError or FileNotFoundError for a source that cannot be read; rows that break a rule go to ``faults``.
    """
    root = place.parent if place.is_file() else place
    if images:
        files = {"train": [file for folder in images for file in _images_under(folder)]}
        names = _names(place, root)
    elif place.is_file():
        document = yaml.safe_load(place.read_text(encoding="utf-8-sig"))
        files, names = _split_files(document, place), _names(place, root)
    else:
        files, names = _by_folder(root), _names(place, root)
    of_class = [classes.find(name) for name in names]
    source = SourceSet("share", classes)
    labelled = 0
    seen: set[Path] = set()
    for split, paths in files.items():
        for path in (path for path in paths if path not in seen):
            seen.add(path)
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else f"{split}/{path.name}"
            source.images.append(SourceImage(split, name, path if path.is_file() else None))
            labelled += _read_labels(source, _label_file(path), len(source.images) - 1, names, of_class, faults)
    if source.images and not labelled:
        first = next(iter(seen))
        raise FileNotFoundError(
            f"{place}: none of {len(seen):,} images has a label file; {_label_file(first)} is looked for, for example"
        )
    return source


def _names(place: Path, root: Path) -> list[str]:
    """Class names in the order of their numbers."""
    if place.is_file():
        names = yaml.safe_load(place.read_text(encoding="utf-8-sig"))["names"]
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"{place}: names must be numbered 0, 1, 2, ..., but got {sorted(names)!r:.100}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise ValueError(f"{place}: names must list the classes, but got {names!r:.100}")
        return [str(name).strip() for name in names]
    for name in _NAME_FILES:
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
            return [line.strip() for line in lines if line.strip()]
    raise FileNotFoundError(f"{root} must hold data.yaml or {' or '.join(_NAME_FILES)}: what are the classes called?")


def _split_files(document: dict[str, Any], place: Path) -> dict[str, list[Path]]:
    """Image files of each split that data.yaml names."""
    base = place.parent / str(document.get("path") or "")
    if not base.is_dir():
        # The path of the machine that the set was made on; the file itself has come along with its folder.
        base = place.parent
    files: dict[str, list[Path]] = {}
    for key, split in SPLIT_NAMES.items():
        given = document.get(key)
        for part in given if isinstance(given, list) else [given] if given else []:
            files.setdefault(split, []).extend(_images_of(base, place.parent, str(part), f"{place}: {key}"))
    return files


def _images_of(base: Path, beside: Path, part: str, what: str) -> list[Path]:
    # Roboflow writes ../train/images for a folder beside the file.
    tries = [base / part, beside / part, *([beside / part[3:]] if part.startswith("../") else [])]
    target = next((path for path in tries if path.exists()), None)
    if target is None:
        raise FileNotFoundError(f"{what}: {part} is no folder or file under {base}")
    if target.is_dir():
        return list(_images_under(target))
    lines = [line.strip() for line in target.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return [_listed_file(line, target.parent, base) for line in lines]


def _listed_file(line: str, beside: Path, base: Path) -> Path:
    """A line of a list of images: relative to the list (./) or to the set, or absolute."""
    tries = [Path(line), beside / line, base / line]
    return next(
        (path for path in tries if path.is_absolute() and path.is_file()),
        next((path for path in tries[1:] if path.is_file()), beside / line),
    )


def _images_under(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"images={folder}: no such folder")
    yield from (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)


def _by_folder(root: Path) -> dict[str, list[Path]]:
    """``images/{split}``, ``{split}/images``, or else all images as train."""
    files: dict[str, list[Path]] = {}
    for word, split in SPLIT_NAMES.items():
        for folder in (root / "images" / word, root / word / "images"):
            if folder.is_dir():
                files.setdefault(split, []).extend(_images_under(folder))
    return files or {"train": list(_images_under(root))}


def _label_file(image: Path) -> Path:
    """Ultralytics' rule: the last folder called images is exchanged for labels; elsewhere beside the image."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    source: SourceSet, path: Path, image: int, names: Sequence[str], of_class: Sequence[int | None], faults: Faults
) -> bool:
    """Whether there is a label file, whose rows are entered."""
    if not path.is_file():
        return False
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    for line, row in enumerate(text.splitlines(), 1):
        words = row.split()
        if not words:
            continue
        try:
            number, values = float(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            note(faults, path.name, "a row must hold numbers", row[:60], line=line)
            continue
        corners = _corners(values)
        if not 0 <= number < len(names) or number != int(number):
            rule = f"a class must be a whole number from 0 to {len(names) - 1}"
            note(faults, path.name, rule, words[0], line=line)
        elif of_class[int(number)] is None:
            note(faults, path.name, "the class must be in the class list", names[int(number)], line=line)
        elif corners is None:
            rule = "a row must be a class with x, y, width, height or with a polygon of three points or more"
            note(faults, path.name, rule, f"{len(words)} fields", line=line)
        else:
            index = of_class[int(number)]
            assert index is not None
            source.boxes.append((image, index, corners, _NO_FLAGS, path.name, line))
    return True


def _corners(values: Sequence[float]) -> tuple[float, float, float, float] | None:
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        return None
    across, down = values[0::2], values[1::2]
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan, math.nan
    return min(across), min(down), max(across), max(down)


def write_yolo(found: DetectionSet, folder: Path) -> None:
    """``labels/{split}/{image_id}.txt`` and ``data.yaml``; the images belong in ``images/{split}``."""
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    start = np.searchsorted(image, np.arange(len(found.images) + 1))
    corners = found.corners
    orientation = found.images["orientation"].to_numpy(dtype=np.int64)
    for kind in np.unique(orientation[orientation > 1]):
        rows = orientation[image] == kind
        corners[rows] = to_turned(corners[rows], int(kind))
    centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    values = np.concatenate([centre, size], axis=1)
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    for split in found.splits:
        (folder / "labels" / SHORT.get(split, split)).mkdir(parents=True)
    for row, (image_id, split) in enumerate(zip(found.images["image_id"], found.images["split"], strict=True)):
        lines = [
            f"{classes[box]} {' '.join(f'{value:.8f}' for value in values[box])}\n"
            for box in range(int(start[row]), int(start[row + 1]))
        ]
        path = folder / "labels" / SHORT.get(split, split) / f"{image_id}.txt"
        path.write_text("".join(lines), encoding="utf-8")
    document = {SHORT.get(split, split): f"images/{SHORT.get(split, split)}" for split in found.splits}
    names = dict(enumerate(found.taxonomy.labels))
    text = yaml.safe_dump({**document, "names": names}, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
