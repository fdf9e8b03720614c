"""Columns on disk: a folder with one ``.npy`` file per column and ``index.json``, verified when opened.

The folder is written beside its place and renamed, so a reader sees a whole one or none. Every file has a CRC-32 in
``index.json``, that file included; opening checks all of them and maps the columns into memory. Cost: one pass over the
bytes to write and one to open.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCUMENT = "index.json"
FORMAT = 2
"""Version of the folder layout; a folder of another version is not opened."""


def save_columns(folder: Path, columns: Mapping[str, NDArray[Any]], document: Mapping[str, Any]) -> None:
    """Write columns and a JSON document as ``folder``, atomically; what stands there already is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        checksums = {}
        for name, column in columns.items():
            file = partial / f"{name}.npy"
            np.save(file, np.ascontiguousarray(column))
            checksums[name] = _file_crc32(file)
        content = {"format": FORMAT, "crc32": checksums, **document}
        sealed = content | {"own_crc32": _document_crc32(content)}
        (partial / DOCUMENT).write_text(json.dumps(sealed), encoding="utf-8")
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_columns(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns, mapped, and the document. Raises ValueError when a part is missing, of another format or damaged."""
    document = _read_document(folder)
    columns = {}
    for name, checksum in document["crc32"].items():
        file = folder / f"{name}.npy"
        if not file.is_file() or _file_crc32(file) != checksum:
            raise ValueError(f"{file}: the column is missing or damaged; delete the folder {folder} to rebuild it")
        columns[name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return columns, document


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a saved index ({error})") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{folder}: index format {found} is not the {FORMAT} this version reads")
    content: dict[str, Any] = {key: value for key, value in document.items() if key != "own_crc32"}
    if document.get("own_crc32") != _document_crc32(content):
        raise ValueError(f"{folder / DOCUMENT}: the file is damaged; delete the folder {folder} to rebuild it")
    return content


def _document_crc32(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _file_crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _put_in_place(partial: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) / "old"
        folder.replace(old)
    partial.replace(folder)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)
