"""Ids of images and classes that come from other layouts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath


def image_ids(names: Sequence[str]) -> list[str]:
    """An id for each image, from its file name with folders: unique, plain file names.

    The stem where only one image has it, else the whole path with ``__`` between its parts (``train/001.jpg`` and
    ``val/001.jpg`` become ``train__001`` and ``val__001``), with the suffix if two paths differ only in it.
    """
    paths = [PurePosixPath(name) for name in names]
    stems = Counter(path.stem for path in paths)
    ids = [path.stem if stems[path.stem] == 1 else "__".join(path.with_suffix("").parts) for path in paths]
    again = Counter(ids)
    ids = [
        f"{image_id}_{path.suffix[1:]}" if again[image_id] > 1 else image_id
        for image_id, path in zip(ids, paths, strict=True)
    ]
    return _unique([re.sub(r"[/\\\x00-\x1f:,\"]", "_", image_id).strip(". ") or "image" for image_id in ids])


def class_ids(names: Sequence[str], given: Sequence[str | None] | None = None) -> list[str]:
    """An id for each class: the given one, else ``/c/`` and the name in lower case with underscores."""
    known_ids = list(given) if given is not None else [None] * len(names)
    made = [
        known or "/c/" + (re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name).casefold()).strip("_") or "class")
        for name, known in zip(names, known_ids, strict=True)
    ]
    return _unique(made)


def _unique(texts: Sequence[str]) -> list[str]:
    """The texts; repeated ones get the suffixes _2, _3, ..."""
    taken, result = set(texts), []
    seen: set[str] = set()
    for text in texts:
        unique, number = text, 1
        while unique in seen or (number > 1 and unique in taken):
            number += 1
            unique = f"{text}_{number}"
        seen.add(unique)
        result.append(unique)
    return result
