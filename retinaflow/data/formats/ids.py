"""Ids and names of images and classes that come from other layouts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

_LONGEST_ID = 200
"""Bytes of an id: a file name has at most 255, with its suffix and what writing in steps adds."""
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")
"""Characters that no class list, list of images or XML file can hold in a name."""


def plain_text(name: str) -> str:
    """A name as it is kept: composed (NFC), control characters as a space, without spaces around it."""
    return unicodedata.normalize("NFC", _NOT_TEXT.sub(" ", name)).strip()


def same_name(name: str) -> str:
    """A key that is equal for names which differ only in Unicode form or in upper and lower case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def image_ids(names: Sequence[str]) -> list[str]:
    """An id for each image, from its file name with folders: unique, plain file names of at most 200 bytes.

    The stem where only one image has it, else the whole path with ``__`` between its parts (``train/001.jpg`` and
    ``val/001.jpg`` become ``train__001`` and ``val__001``), with the suffix if two paths differ only in it. Of a longer
    one the end is kept, with a hash of the whole. Ids differ in more than upper and lower case: some file systems
    ignore it.
    """
    paths = [PurePosixPath(unicodedata.normalize("NFC", name)) for name in names]
    stems = Counter(same_name(path.stem) for path in paths)
    ids = [path.stem if stems[same_name(path.stem)] == 1 else "__".join(path.with_suffix("").parts) for path in paths]
    again = Counter(map(same_name, ids))
    ids = [
        f"{image_id}_{path.suffix[1:]}" if again[same_name(image_id)] > 1 else image_id
        for image_id, path in zip(ids, paths, strict=True)
    ]
    plain = [re.sub(r"[/\\\x00-\x1f\x7f:,\"]", "_", image_id).strip(". ") or "image" for image_id in ids]
    return _unique([_short(image_id) for image_id in plain])


def _short(image_id: str) -> str:
    data = image_id.encode("utf-8", "replace")
    if len(data) <= _LONGEST_ID:
        return image_id
    digest = hashlib.sha256(data).hexdigest()[:12]
    return f"{digest}_{data[len(digest) + 1 - _LONGEST_ID :].decode('utf-8', 'ignore').strip('. ')}"


def class_ids(names: Sequence[str], given: Sequence[str | None] | None = None) -> list[str]:
    """An id for each class: the given one, else ``/c/`` and the name in lower case with underscores."""
    known_ids = list(given) if given is not None else [None] * len(names)
    made = [
        known or "/c/" + (re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name).casefold()).strip("_") or "class")
        for name, known in zip(names, known_ids, strict=True)
    ]
    return _unique(made)


def _unique(texts: Sequence[str]) -> list[str]:
    """The texts; those that repeat one, in any case, get the suffixes _2, _3, ..."""
    taken, result = {same_name(text) for text in texts}, []
    seen: set[str] = set()
    for text in texts:
        unique, number = text, 1
        while same_name(unique) in seen or (number > 1 and same_name(unique) in taken):
            number += 1
            unique = f"{text}_{number}"
        seen.add(same_name(unique))
        result.append(unique)
    return result
