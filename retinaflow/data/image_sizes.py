"""Sizes of image files: read from their headers by threads and recorded in a journal, or given as a table.

Sizes are appended to the journal while headers are read. So a reading that was stopped resumes, and a reading of more
images opens only the new files. A line of the journal is ``name, height, width, bytes, time of change in ns, CRC-32 of
the line``, tab-separated. It is valid only while the file has those bytes and that time; a torn or damaged line is
ignored. Several processes may append at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

THREADS = 16
_AT_ONCE = 256
"""Images per task of a thread; then their sizes are written to the journal."""


class _Known(NamedTuple):
    height: int
    width: int
    bytes: int
    changed_ns: int


class SizeTable(NamedTuple):
    """Given sizes: ``ids [S]`` and (height, width) ``sizes [S, 2]``."""

    ids: NDArray[np.str_]
    sizes: NDArray[np.int32]

    def look_up(self, image_ids: NDArray[np.str_]) -> NDArray[np.int32]:
        """``[I, 2]`` sizes of some images, 0 where the table has none."""
        found = np.zeros((len(image_ids), 2), dtype=np.int32)
        if len(self.ids):
            order = np.argsort(self.ids)
            position = np.minimum(np.searchsorted(self.ids, image_ids, sorter=order), len(order) - 1)
            is_known = self.ids[order[position]] == image_ids
            found[is_known] = self.sizes[order[position[is_known]]]
        return found


def read_sizes(
    root: Path,
    files: Sequence[str],
    read: Callable[[Path], tuple[int, int] | str],
    *,
    journal: Path | None = None,
) -> Iterator[tuple[int, int] | str]:
    """(height, width) of each file under ``root``, in order, or the reason of ``read`` why it cannot be used.

    With a ``journal`` known sizes are taken from it and new ones added. A journal that cannot be written is ignored.
    """
    known = _read_journal(journal)
    parts = [files[first : first + _AT_ONCE] for first in range(0, len(files), _AT_ONCE)]

    def sizes_of(part: Sequence[str]) -> tuple[list[tuple[int, int] | str], bytes]:
        sizes, lines = [], []
        for name in part:
            size, line = _size_of(root, name, known.get(name), read)
            sizes.append(size)
            lines.append(line)
        return sizes, b"".join(lines)

    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=len(files), desc="image sizes", unit="image", disable=None, leave=False) as bar,
    ):
        for sizes, lines in threads.map(sizes_of, parts):
            journal = _append(journal, lines)
            bar.update(len(sizes))
            yield from sizes


def _size_of(
    root: Path, name: str, known: _Known | None, read: Callable[[Path], tuple[int, int] | str]
) -> tuple[tuple[int, int] | str, bytes]:
    """The size, and the line to add to the journal; empty if there is none."""
    path = root / name
    try:
        status = path.stat()
    except OSError as error:
        return str(error), b""
    if known is not None and (known.bytes, known.changed_ns) == (status.st_size, status.st_mtime_ns):
        return (known.height, known.width), b""
    size = read(path)
    if isinstance(size, str) or "\t" in name or "\n" in name:
        return size, b""
    content = f"{name}\t{size[0]}\t{size[1]}\t{status.st_size}\t{status.st_mtime_ns}".encode()
    return size, b"%s\t%08x\n" % (content, zlib.crc32(content))


def _append(journal: Path | None, lines: bytes) -> Path | None:
    """Add whole lines. Returns None when that fails (a full disk, a read-only folder), so that it is not tried
    again."""
    if journal is None or not lines:
        return journal
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("ab", buffering=0) as file:
            file.write(lines)
    except OSError:
        return None
    return journal


def _read_journal(journal: Path | None) -> dict[str, _Known]:
    if journal is None or not journal.is_file():
        return {}
    known = {}
    with journal.open("rb") as file:
        for line in file:
            content, _, checksum = line.rstrip(b"\n").rpartition(b"\t")
            if checksum == b"%08x" % zlib.crc32(content):
                name, *numbers = content.decode().split("\t")
                known[name] = _Known(*map(int, numbers))
    return known
