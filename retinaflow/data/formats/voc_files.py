"""The files of a Pascal VOC folder: its annotation files, their splits, and the files that are left out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from retinaflow.data.formats.folders import SPLIT_NAMES, files_under, hidden, safe_name, split_of
from retinaflow.data.formats.source import note
from retinaflow.data.images import SUFFIXES
from retinaflow.data.tables import RowErrors
from retinaflow.data.text_lines import read_lines

_PAIRS = re.compile(r"\s+(-1|0|1)$")
"""At the end of a line in the list of one class: whether the image shows the class."""
_ENCODING = re.compile(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"']")


def annotation_files(folder: Path) -> Iterator[Path]:
    """The XML files in the folders that tools use, at most two folders deep; some are yielded twice."""
    for pattern in ("Annotations/*.xml", "*.xml", "*/*.xml", "*/Annotations/*.xml"):
        yield from (path for path in sorted(folder.glob(pattern)) if not hidden(path, folder))


def listed(folder: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """(split, annotation file) of every image, some of them twice; and the files that no list names.

    The lists of a folder (``ImageSets/Main``) decide for all files below it, elsewhere the names of folders.
    Raises DataError for a list that cannot be read.
    """
    files = dict.fromkeys(annotation_files(folder))
    roots = dict.fromkeys([folder, *(path.parent.parent for path in files if path.parent.name == "Annotations")])
    lists = {root: found for root in roots if (found := _lists(root))}
    rows = [row for root, found in lists.items() for path in found for row in _rows(path, root / "Annotations")]
    named = {path for _, path in rows}
    others = [path for path in files if path not in named]
    unlisted = [path for path in others if not lists.keys().isdisjoint(path.parents)]
    left = set(unlisted)
    rows += [(split_of(*_folders(path, folder)) or "train", path) for path in others if path not in left]
    return rows, unlisted


def _lists(root: Path) -> list[Path]:
    """The lists of splits beside a folder of annotations; trainval last, because it repeats the others."""
    files = [path for path in sorted((root / "ImageSets" / "Main").glob("*.txt")) if path.stem in SPLIT_NAMES]
    return sorted(files, key=lambda path: path.stem == "trainval")


def _rows(path: Path, annotations: Path) -> Iterator[tuple[str, Path]]:
    for line in map(str.strip, read_lines(path)):
        if line:
            whole = annotations / f"{safe_name(line, path.name)}.xml"
            short = annotations / f"{safe_name(_PAIRS.sub('', line), path.name)}.xml"
            yield SPLIT_NAMES[path.stem], whole if whole.is_file() else short


def _folders(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parent.parts


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


def report_left_out(folder: Path, used: set[Path], unlisted: Sequence[Path], report: Callable[[str], None]) -> None:
    """Report annotation files that no list names, and image files that are not ``used``."""
    if unlisted:
        report(
            f"{len(unlisted):,} annotation files are in none of the lists in ImageSets/Main and are left out, "
            f"{unlisted[0].name} for example"
        )
    files = [
        path for path in files_under(folder) if path.suffix.lower() in SUFFIXES and "Segmentation" not in str(path)
    ]
    left = [path for path in files if path not in used]
    if left:
        report(
            f"{len(left):,} image files have no annotation file and are left out, {left[0].name} for example (an image "
            "without objects needs an XML file without them)"
        )
