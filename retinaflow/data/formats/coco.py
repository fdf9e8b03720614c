"""COCO JSON (cocodataset.org/#format-data) and LVIS JSON <-> detection sets.

Boxes are ``[x, y, width, height]`` in pixels, from 0. ``iscrowd`` is group-of. Category ids need not be consecutive;
classes keep the order of the list of categories. An LVIS file (images with ``neg_category_ids``) lists the classes that
are annotated on each image; the others are unknown there (``not_exhaustive_category_ids``, classes of which some
objects have no box, is not read). ``label_name`` of a category, ``occluded`` and ``truncated`` among the ``attributes``
of an annotation (as CVAT writes them) are read and written too, and :func:`write_coco` writes LVIS's
``neg_category_ids`` for a set that is not exhaustive.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import existing, find_image, safe_name, split_of
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError, shown

SHORT = {"validation": "val"}
"""Names of splits in COCO."""
_LISTS = ("images", "annotations", "categories")


def find_coco(path: Path) -> dict[str, Path]:
    """The annotation files by split: a JSON file itself, or those of a folder with images, annotations and categories.

    Of COCO's own files only those of instances are read (not captions, keypoints, panoptic). Raises DataError for two
    files of one split.
    """
    if path.is_file():
        return {split_of(path.stem) or "train": path}
    folder = path
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    instances = [path for path in files if path.name.startswith("instances_")]
    found: dict[str, Path] = {}
    for path in instances or [path for path in files if _is_coco(path)]:
        split = split_of(path.stem, *path.relative_to(folder).parent.parts) or "train"
        if split in found:
            raise DataError(
                f"{folder}: a split must have one annotation file, but {found[split].name} and {path.name} are both "
                f"{split}; give the one to read as data="
            )
        found[split] = path
    return found


def _is_coco(path: Path) -> bool:
    """Whether a JSON file looks like COCO. Its text is searched but not parsed, because the files are large."""
    with path.open("rb") as file:
        wanted = {f'"{name}"'.encode() for name in _LISTS}
        rest = b""
        while wanted and (block := file.read(1 << 22)):
            wanted -= {word for word in wanted if word in rest + block}
            rest = block[-16:]
    return not wanted


def read_coco(
    files: dict[str, Path],
    errors: RowErrors,
    *,
    folder: Path,
    classes: ClassNames,
    images: Sequence[Path] = (),
    report: Callable[[str], None] = lambda text: None,
) -> SourceSet:
    """The annotation files of each split, in ``folder``; ``images``: folders that are searched before the usual ones.

    Raises DataError for a file that is no COCO JSON; annotations that break a rule go to ``errors``.
    """
    source = SourceSet("pixel", classes)
    roots: list[Path] = []
    for split, path in files.items():
        document = _document(path)
        categories = _categories(document["categories"], path, classes, errors)
        own = existing([*images, *_roots(path, split, folder)])
        positions = _images(source, document["images"], path, split, own, categories, errors)
        for number, annotation in enumerate(document["annotations"], 1):
            _annotation(source, annotation, f"{path.name} annotation {number}", positions, categories, errors)
        roots += own
    _find_by_bare_names(source, roots, report)
    if classes.given is None:
        _settle_equal_names(source, report)
    return source


def _find_by_bare_names(source: SourceSet, roots: Sequence[Path], report: Callable[[str], None]) -> None:
    """Find the files of images that are not at their paths: by the name without folders, where it is unambiguous."""
    bare = Counter(PurePosixPath(image.name).name for image in source.images)
    taken = {image.file for image in source.images}
    found = 0
    for position, image in enumerate(source.images):
        name = PurePosixPath(image.name).name
        if image.file is None and bare[name] == 1:
            files = {folder / name for folder in roots if (folder / name).is_file()} - taken
            if len(files) == 1:
                source.images[position] = replace(image, file=files.pop())
                found += 1
    if found:
        report(f"{found:,} images were found by their names alone, not in the folders that file_name names")


def _settle_equal_names(source: SourceSet, report: Callable[[str], None]) -> None:
    """Remove repeated classes without a box (exports put the name of a group before its classes); others stay."""
    boxed = {index for _, index, *_ in source.boxes}
    unwanted: set[int] = set()
    for name, count in Counter(source.classes.names).items():
        if count > 1:
            own = [index for index, other in enumerate(source.classes.names) if other == name]
            used = [index for index in own if index in boxed] or own[:1]
            unwanted |= set(own) - set(used)
            if len(used) > 1:
                report(
                    f"{len(used)} categories have the name {name}; they stay {len(used)} classes with ids of their own"
                )
    if unwanted:
        source.leave_out_classes(unwanted)


def _document(path: Path) -> dict[str, list[Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from None
    for name in _LISTS:
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise DataError(f"{path}: a COCO file must hold a list of {name}, but holds none")
    return dict(document)


def _categories(listed: list[Any], path: Path, classes: ClassNames, errors: RowErrors) -> dict[Any, int]:
    """Category id -> class index; -1 for a category that breaks a rule."""
    found: dict[Any, int] = {}
    names: Counter[str] = Counter()
    for number, category in enumerate(listed, 1):
        where = f"{path.name} category {number}"
        if not isinstance(category, dict) or not isinstance(category.get("name"), str) or not category["name"].strip():
            raise DataError(f"{where}: a category must have an id and a name, but got {shown(category)}")
        key = category.get("id")
        if not isinstance(key, int | str) or key in found:
            raise DataError(f"{where}: a category must have an id of its own, but got id={key!r}")
        given, name = category.get("label_name"), category["name"].strip()
        class_index = classes.find(name, class_id=given if isinstance(given, str) else None, number=names[name])
        names[name] += 1
        found[key] = -1 if class_index is None else class_index
        if class_index is None:
            note(errors, where, "a category must be in the class list", f"name={category['name']!r}")
    return found


def _images(
    source: SourceSet,
    listed: list[Any],
    path: Path,
    split: str,
    roots: Sequence[Path],
    categories: dict[Any, int],
    errors: RowErrors,
) -> dict[Any, int]:
    """Image id -> position among the images of the source, to which the images are added."""
    positions: dict[Any, int] = {}
    names: set[str] = set()
    for number, image in enumerate(listed, 1):
        where = f"{path.name} image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
            raise DataError(f"{where}: an image must have an id, but got {shown(image)}")
        url = str(image.get("coco_url", ""))
        # LVIS has no file names: the URL ends with train2017/000000391895.jpg.
        given = image.get("file_name") or "/".join(url.split("/")[-2:])
        try:
            name = safe_name(given, where)
        except DataError:
            note(errors, where, "file_name must stay inside the image folder", f"file_name={shown(given)}")
            continue
        if image["id"] in positions or name in names:
            note(errors, where, "an image must be listed once", f"id={image['id']}, file_name={name}")
            continue
        names.add(name)
        positions[image["id"]] = len(source.images)
        file = find_image(name, roots)
        sides = [
            side for side in (image.get("height"), image.get("width")) if isinstance(side, int | float) and side >= 1
        ]
        size = (int(sides[0]), int(sides[1])) if len(sides) == 2 else None
        # One folder for each split distinguishes files of the same name.
        folder = "" if "/" in name else f"{SHORT.get(split, split)}/"
        source.images.append(SourceImage(split, f"{folder}{name}", file, size))
        if "neg_category_ids" in image:
            source.federated = True
            negatives = image["neg_category_ids"] or []
            if not isinstance(negatives, list):
                raise DataError(f"{where}: neg_category_ids must be a list of category ids, but got {shown(negatives)}")
            absent = [index for key in negatives if (index := _at(categories, key)) is not None]
            source.absent += [(positions[image["id"]], index) for index in absent if index >= 0]
    return positions


def _roots(path: Path, split: str, folder: Path) -> Iterator[Path]:
    """Folders in ``folder`` that usually hold the images of an annotation file."""
    words = [path.stem.removeprefix("instances_"), split, SHORT.get(split, split)]
    words += ["valid"] if split == "validation" else []
    for base in (base for base in (path.parent, path.parent.parent) if base == folder or folder in base.parents):
        yield from (base, base / "images")
        yield from (base / word for word in words)
        yield from (base / "images" / word for word in words)


def _annotation(
    source: SourceSet,
    annotation: Any,
    where: str,
    positions: dict[Any, int],
    categories: dict[Any, int],
    errors: RowErrors,
) -> None:
    if not isinstance(annotation, dict):
        note(errors, where, "an annotation must be an object", f"{shown(annotation)}")
        return
    image, category = (
        _at(table, annotation.get(key)) for table, key in ((positions, "image_id"), (categories, "category_id"))
    )
    box = annotation.get("bbox")
    if image is None:
        note(errors, where, "image_id must be that of a listed image", f"image_id={annotation.get('image_id')!r}")
    elif category is None:
        rule = "category_id must be that of a listed category"
        note(errors, where, rule, f"category_id={annotation.get('category_id')!r}")
    elif not _is_box(box):
        note(errors, where, "bbox must be four numbers [x, y, width, height]", f"bbox={shown(box)}")
    elif category >= 0:
        assert isinstance(box, list)
        x, y, width, height = map(float, box)
        more = annotation.get("attributes")
        attributes = more if isinstance(more, dict) else {}
        flags = [_is_true(attributes.get(name)) for name in FLAGS]
        flags[FLAGS.index("group_of")] |= _is_true(annotation.get("iscrowd"))
        source.boxes.append((image, category, (x, y, x + width, y + height), tuple(flags), where, 0))


def _at(table: dict[Any, int], key: Any) -> int | None:
    return table.get(key) if isinstance(key, int | str) else None


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)


def _is_true(value: Any) -> bool:
    return value in (1, True) or str(value).lower() in ("1", "true", "yes")


def write_coco(found: DetectionSet, folder: Path, files: Sequence[str]) -> None:
    """``annotations/instances_{split}.json``; ``files``: name of each image's file in its split's folder."""
    (folder / "annotations").mkdir()
    ids = np.arange(1, len(found.images) + 1)
    categories = [
        {"id": number, "name": name, "label_name": mid}
        for number, (mid, name) in enumerate(zip(found.taxonomy.ids, found.taxonomy.names, strict=True), 1)
    ]
    negatives: dict[int, list[int]] = {}
    absent = found.labels.loc[~found.labels["present"].astype(bool), ["image", "class"]].to_numpy(dtype=np.int64)
    for row, index in absent.tolist():
        negatives.setdefault(row, []).append(index + 1)
    for split in found.splits:
        rows = np.flatnonzero(found.images["split"].to_numpy() == split)
        images = []
        for row in rows.tolist():
            size = {"height": int(found.images["height"][row]), "width": int(found.images["width"][row])}
            image: dict[str, Any] = {"id": int(ids[row]), "file_name": files[row], **size}
            if not found.exhaustive:
                image |= {"neg_category_ids": negatives.get(row, []), "not_exhaustive_category_ids": []}
            images.append(image)
        document = {
            "info": {"description": "written by retinaflow"},
            "licenses": [],
            "images": images,
            "annotations": _annotations(found, set(rows.tolist())),
            "categories": categories,
        }
        path = folder / "annotations" / f"instances_{SHORT.get(split, split)}.json"
        path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _annotations(found: DetectionSet, rows: set[int]) -> list[dict[str, Any]]:
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    sizes = found.images[["width", "height", "width", "height"]].to_numpy(dtype=np.float64)[image]
    corners = found.corners * sizes
    flags = found.boxes[list(FLAGS)].to_numpy(dtype=bool)
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    written = []
    for box in (box for box in range(len(image)) if int(image[box]) in rows):
        x1, y1, x2, y2 = corners[box].tolist()
        flags_of_box = {
            name: True for name, is_set in zip(FLAGS, flags[box], strict=True) if is_set and name != "group_of"
        }
        written.append(
            {
                "id": box + 1,
                "image_id": int(image[box]) + 1,
                "category_id": int(classes[box]) + 1,
                "bbox": [round(x1, 6), round(y1, 6), round(x2 - x1, 6), round(y2 - y1, 6)],
                "area": round((x2 - x1) * (y2 - y1), 6),
                "iscrowd": int(flags[box][FLAGS.index("group_of")]),
                "segmentation": [],
                **({"attributes": flags_of_box} if flags_of_box else {}),
            }
        )
    return written
