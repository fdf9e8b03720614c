"""The label file of each image of a YOLO data set.

By Ultralytics' rule it lies in ``labels`` where the image lies in ``images`` (the last such folder inside the data set;
folders above it are never exchanged), or else beside the image. Its name is that of the image, with ``.txt`` instead of
the suffix or after it, in any case and Unicode form. Where no image has such a file, labels may lie apart from the
images: then the only label file of an image's name counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from retinaflow.data.formats.folders import ReadableFolders, files_under
from retinaflow.data.formats.ids import same_name
from retinaflow.errors import DataError

_IMAGE_FOLDERS = ("images", "jpegimages")


def label_files(
    images: Sequence[Path], root: Path, readable: ReadableFolders, *, not_labels: Sequence[Path] = ()
) -> dict[Path, Path]:
    """The label file of each of some images that has one.

    Raises DataError for a label file of two images: which of them its boxes belong to is not known.
    """
    beside = set(not_labels)
    names = _Names(readable, beside)
    found = {image: label for image in images if (label := _of_image(image, root, names)) is not None}
    if not found:
        found = _apart(images, root, readable, beside)
    _refuse_shared(found)
    return found


def expected_label(image: Path, root: Path) -> Path:
    """Where the label file of an image is looked for first."""
    return _folders(image, root)[0] / f"{image.stem}.txt"


def _folders(image: Path, root: Path) -> list[Path]:
    parts = image.parent.relative_to(root).parts if image.is_relative_to(root) else ()
    found = []
    for position in reversed(range(len(parts))):
        if parts[position].lower() in _IMAGE_FOLDERS:
            found.append(root.joinpath(*parts[:position], "labels", *parts[position + 1 :]))
            break
    return [*found, image.parent]


def _of_image(image: Path, root: Path, names: _Names) -> Path | None:
    return next((label for folder in _folders(image, root) if (label := names.find(folder, image.name))), None)


class _Names:
    """The text files of folders by name, each folder listed once."""

    def __init__(self, readable: ReadableFolders, others: set[Path]) -> None:
        self._readable, self._others = readable, others
        self._folders: dict[Path, Mapping[str, list[Path]]] = {}

    def find(self, folder: Path, image: str) -> Path | None:
        """The label file of an image name in a folder."""
        if folder not in self._folders:
            self._folders[folder] = self._listed(folder)
        texts = self._folders[folder]
        for name in (f"{Path(image).stem}.txt", f"{image}.txt"):
            hits = texts.get(same_name(name), [])
            exact = [path for path in hits if path.name == name]
            if exact or len(hits) == 1:
                return (exact or hits)[0]
        return None

    def _listed(self, folder: Path) -> dict[str, list[Path]]:
        texts: dict[str, list[Path]] = {}
        if folder.is_dir():
            self._readable.require(folder)
            for path in folder.iterdir():
                is_text = path.suffix.lower() == ".txt" and not path.name.startswith(".")
                if is_text and path not in self._others and path.is_file():
                    texts.setdefault(same_name(path.name), []).append(self._readable.require(path))
        return texts


def _apart(images: Sequence[Path], root: Path, readable: ReadableFolders, others: set[Path]) -> dict[Path, Path]:
    labels: dict[str, list[Path]] = {}
    for path in files_under(root, readable):
        if path.suffix.lower() == ".txt" and path not in others:
            labels.setdefault(same_name(path.name), []).append(path)
    found = {}
    for image in images:
        hits = labels.get(same_name(f"{image.stem}.txt")) or labels.get(same_name(f"{image.name}.txt"), [])
        if len(hits) == 1:
            found[image] = hits[0]
    return found


def _refuse_shared(found: Mapping[Path, Path]) -> None:
    owner: dict[Path, Path] = {}
    for image, label in found.items():
        if label in owner:
            raise DataError(
                f"{label}: a label file must be of one image, but {owner[label]} and {image} have this name; remove "
                "one of the images, or rename it with a label file of its own"
            )
        owner[label] = image
