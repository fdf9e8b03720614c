"""Columns on disk: a folder with one ``.npy`` file per column and ``index.json``, verified when opened.

The folder is made beside its path and renamed, so a reader sees a whole folder or none. ``index.json`` has a checksum
of every column file and of itself; opening verifies all of them, by threads, and maps the columns into memory.

The checksum of a file is the CRC-32 of the sums of its 64 KiB blocks (of 8-byte words, modulo 2^64) and of its size. A
changed bit or byte, and a missing, exchanged or emptied block, change it with near certainty, as they change a CRC over
every byte, but it is computed at the speed of memory: 0.2 s instead of 0.8 s per GB. It does not protect against
deliberate changes. A process that received an opened index (a loader worker) maps the files without verifying them
again.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.errors import DataError
from retinaflow.files import atomic_folder

DOCUMENT = "index.json"
FORMAT = 3
"""Version of the folder layout; a folder of another version is not opened."""
_SUMMED = 1 << 16
"""Bytes of a block that are summed into one word of the checksum."""
_READ = 64 * _SUMMED
"""Bytes read at a time, few enough to stay in the processor's cache."""


def save_columns(folder: Path, columns: Mapping[str, NDArray[Any]], document: Mapping[str, Any]) -> None:
    """Write columns and a JSON document as ``folder``, atomically; a folder that is there is replaced."""
    with atomic_folder(folder, replace=True) as partial:
        for name, column in columns.items():
            np.save(partial / f"{name}.npy", np.ascontiguousarray(column))
        content = {"format": FORMAT, "checksums": _checksums(partial, columns), **document}
        sealed = content | {"own_crc32": _document_crc32(content)}
        (partial / DOCUMENT).write_text(json.dumps(sealed), encoding="utf-8")


def open_columns(folder: Path, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns, mapped, and the document. Raises DataError when a part is missing, of another format or damaged."""
    document = _read_document(folder)
    expected = document["checksums"]
    try:
        found = _checksums(folder, expected) if verify else expected
        for name in expected:
            if found[name] != expected[name]:
                raise DataError(f"{folder / name}.npy: the column is damaged; delete the folder {folder} to rebuild it")
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in expected}
    except OSError as error:
        raise DataError(f"{folder}: a column cannot be read ({error}); delete the folder to rebuild it") from None
    return columns, document


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a saved index ({error})") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise DataError(f"{folder}: index format {found} is not the {FORMAT} this version reads")
    content: dict[str, Any] = {key: value for key, value in document.items() if key != "own_crc32"}
    if document.get("own_crc32") != _document_crc32(content):
        raise DataError(f"{folder / DOCUMENT}: the file is damaged; delete the folder {folder} to rebuild it")
    return content


def _document_crc32(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Name of a column -> checksum of its file."""
    files = {name: folder / f"{name}.npy" for name in names}
    with ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(_file_checksum, files.values()), strict=True))


def _file_checksum(file: Path) -> int:
    buffer = np.empty(_READ, dtype=np.uint8)
    checksum, size = 0, 0
    with file.open("rb", buffering=0) as stream:
        while count := _fill(stream, buffer):
            # The last block is padded with zeros; the size distinguishes them from zeros of the file.
            whole = -(-count // _SUMMED) * _SUMMED
            buffer[count:whole] = 0
            sums = buffer[:whole].view(np.uint64).reshape(-1, _SUMMED // 8).sum(axis=1)
            checksum = zlib.crc32(sums.tobytes(), checksum)
            size += count
    return zlib.crc32(str(size).encode(), checksum)


def _fill(stream: io.RawIOBase, buffer: NDArray[np.uint8]) -> int:
    """Read until the buffer is full or the file ends, because a short read would move the block boundaries."""
    view, filled = buffer.data, 0
    while filled < len(buffer) and (count := stream.readinto(view[filled:])):
        filled += count
    return filled
