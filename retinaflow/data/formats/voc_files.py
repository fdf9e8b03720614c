"""The files of a Pascal VOC data set: its annotation files, their splits, and the files that are left out.

Annotation files lie at any depth. Splits come from the lists in ``ImageSets/Main`` (or in ``ImageSets``), which decide
for all files beside and below them, else from lists in the data folder, else from folders that are named by split.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from retinaflow.data.formats.folders import (
    SPLIT_NAMES,
    FileFinder,
    ReadableFolders,
    files_under,
    safe_name,
    split_of_folders,
)
from retinaflow.data.formats.ids import same_name
from retinaflow.data.formats.source import note
from retinaflow.data.image_folders import SUFFIXES
from retinaflow.data.tables import RowErrors
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, shown
from retinaflow.progress import report

_PAIRS = re.compile(r"\s+(-1|0|1)$")
"""At the end of a line in the list of one class: whether the image shows the class."""
_NO_SPLIT = ("default", "all")
"""Names of lists of all images, as CVAT writes them."""
_ENCODING = re.compile(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"']")


def annotation_files(folder: Path, readable: ReadableFolders | None = None) -> list[Path]:
    """The XML files of a folder at any depth; None: links that lead out of it are skipped."""
    return [path for path in files_under(folder, readable) if path.suffix.lower() == ".xml"]


def is_annotation(path: Path) -> bool:
    """Whether an XML file looks like one of VOC."""
    with path.open("rb") as file:
        start = file.read(1 << 12)
    return re.search(rb"<annotation[\s/>]", start.replace(b"\0", b"")) is not None


def listed(folder: Path, files: Sequence[Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    """(split, annotation file) of every image, some of them twice; and the files that no list names.

    Raises DataError for a list that cannot be read, and where all lists have names that are no splits.
    """
    rows: list[tuple[str, Path]] = []
    decided: set[Path] = set()
    for root in dict.fromkeys(path.parent for path in _list_folders(folder)):
        own = [path for path in files if path.is_relative_to(root)]
        if lists := _lists(root / "ImageSets"):
            rows += _rows(lists, root / "Annotations", own)
            decided.update(own)
    if not rows and (lists := _root_lists(folder)):
        rows += _rows(lists, folder, files)
        decided.update(files)
    named = {path for _, path in rows}
    rows += [
        (split_of_folders(path.relative_to(folder).parts[:-1]) or "train", path)
        for path in files
        if path not in decided
    ]
    return rows, [path for path in files if path in decided and path not in named]


def _list_folders(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("ImageSets")) if path.is_dir())


def _lists(folder: Path) -> list[Path]:
    """The lists of splits in ImageSets; trainval last, because it repeats the others."""
    main = folder / "Main"
    found = sorted((main if main.is_dir() else folder).glob("*.txt"))
    known = [path for path in found if path.stem.lower() in SPLIT_NAMES]
    others = [path for path in found if path not in known and path.stem.lower() not in _NO_SPLIT]
    others = [path for path in others if not _is_list_of_class(path)]
    if others and not known:
        raise DataError(
            f"{others[0]}: the name of a list must be train, val, trainval or test, but got {others[0].name}; rename "
            "the lists, or remove ImageSets to read all images"
        )
    if others:
        report(f"{len(others):,} lists are of no split that is known and are left out, {others[0]} for example")
    return sorted(known, key=lambda path: path.stem.lower() == "trainval")


def _is_list_of_class(path: Path) -> bool:
    """Whether a list is of one class (``cat_train.txt``): a number follows each image."""
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    return not lines or all(_PAIRS.search(line) for line in lines)


def _root_lists(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.glob("*.txt")) if path.stem.lower() in SPLIT_NAMES]
    return sorted(found, key=lambda path: path.stem.lower() == "trainval")


def _rows(lists: Iterable[Path], annotations: Path, files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        by_stem.setdefault(same_name(path.stem), []).append(path)
    for path in lists:
        for number, line in enumerate(map(str.strip, read_lines(path)), 1):
            if line:
                yield SPLIT_NAMES[path.stem.lower()], _listed(line, f"{path} line {number}", annotations, by_stem)


def _listed(line: str, where: str, annotations: Path, by_stem: dict[str, list[Path]]) -> Path:
    """The annotation file that a line names: by an id, by the name of the image or of the file, with folders or not."""
    # Some tools write the image and the annotation file in one line.
    pair = line.split()
    whole = pair[-1] if len(pair) == 2 and pair[-1].lower().endswith(".xml") else line
    for text in dict.fromkeys([whole, _PAIRS.sub("", whole)]):
        name = PurePosixPath(safe_name(text, where))
        bare = name.name
        stems = [bare]
        if PurePosixPath(bare).suffix.lower() in (*SUFFIXES, ".xml"):
            stems.append(PurePosixPath(bare).stem)
        for stem in stems:
            hits = by_stem.get(same_name(stem), [])
            hits = [path for path in hits if path.stem == stem] or hits
            folders = name.parts[:-1]
            beside = [path for path in hits if folders and path.parent.parts[-len(folders) :] == folders]
            hits = beside or hits
            if len(hits) == 1:
                return hits[0]
            if hits:
                rule = "a line must name one annotation file, with its folders where names repeat"
                raise DataError(f"{where}: {rule}, but {hits[0]} and {hits[1]} match {shown(text)}")
    return annotations / f"{name}.xml"


def read_root(path: Path, errors: RowErrors) -> ElementTree.Element | None:
    """The ``<annotation>`` of a file; None, and an error, for another file."""
    try:
        root = _parsed(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        note(errors, path.name, "an annotation file must be readable XML", f"the parser error {error}")
        return None
    if root.tag != "annotation":
        note(errors, path.name, "a VOC file must begin with <annotation>", f"<{root.tag}>")
        return None
    return root


def _parsed(data: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(data)
    except ValueError:
        # The parser refuses multi-byte encodings (gb2312) that Python can decode.
        declared = _ENCODING.match(data)
        if not declared:
            raise
        return ElementTree.fromstring(data.decode(declared[1].decode()))


def report_left_out(finder: FileFinder, used: set[Path], unlisted: Sequence[Path]) -> None:
    """Report annotation files that no list names, and image files that are not ``used``."""
    if unlisted:
        report(
            f"{len(unlisted):,} annotation files are in none of the lists and are left out, {unlisted[0].name} for "
            "example"
        )
    left = [path for path in finder.all() if path not in used and not path.parent.name.startswith("Segmentation")]
    if left:
        report(
            f"{len(left):,} image files have no annotation file and are left out, {left[0].name} for example (an image "
            "without objects needs an XML file without them)"
        )
