"""Image files: fetched by several connections, verified, and there whole or not at all.

A file has its name only once its length, its MD5 where one is known, and its decoding are right; so a download that
was stopped resumes what is not there yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retinaflow.data.download.http import Fetcher, MissingFileError, UnreachableError, hex_of
from retinaflow.data.images import UnreadableImageError, decode_bytes

HOPELESS = 20
"""So many lost before any was fetched: the download ends."""


@dataclass(frozen=True)
class Picture:
    """One image to fetch; ``size`` (bytes) and ``md5`` (base64) where they are known, else 0 and empty."""

    image_id: str
    url: str
    target: Path
    size: int = 0
    md5: str = ""

    @property
    def is_there(self) -> bool:
        """Whether the file has been fetched."""
        return self.target.is_file()


@dataclass
class Fetched:
    """What became of the pictures that were not there: (image id, reason) of those without a file."""

    count: int = 0
    bytes: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    """The server does not have them."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """They could not be read whole; another attempt may."""


def fetch_pictures(
    pictures: Sequence[Picture],
    fetcher: Fetcher,
    *,
    connections: int,
    skip: bool = False,
    check: Callable[[], None] = lambda: None,
    quiet: bool = True,
) -> Fetched:
    """Fetch those pictures that are not there yet. ``check`` may raise to end it.

    Raises UnreachableError when the first :data:`HOPELESS` are all lost. Images that the server does not have count
    only when none was there before and without ``skip``; when some were there, nothing counts with ``skip``.
    """
    result = Fetched()
    wanted = [picture for picture in pictures if not picture.is_there]
    # An earlier attempt may have left nothing but what cannot be had.
    is_first = len(wanted) == len(pictures)
    threads = ThreadPoolExecutor(connections)
    try:
        futures = {threads.submit(_fetch, picture, fetcher): picture for picture in wanted}
        for future in tqdm(as_completed(futures), total=len(wanted), desc="images", disable=quiet, leave=False):
            check()
            picture = futures[future]
            try:
                result.bytes += future.result()
                result.count += 1
            except MissingFileError as error:
                result.missing.append((picture.image_id, str(error)))
            except UnreachableError as error:
                result.failed.append((picture.image_id, str(error)))
            if not result.count and (is_first or not skip):
                _end_when_hopeless(result, count_missing=is_first and not skip)
    finally:
        # What has not begun is not begun, and what waits does so no longer.
        fetcher.stopped.set()
        threads.shutdown(wait=True, cancel_futures=True)
        fetcher.stopped.clear()
    return result


def _end_when_hopeless(result: Fetched, *, count_missing: bool) -> None:
    """Raises UnreachableError when enough are lost to think that all will be."""
    lost = [*result.missing, *result.failed] if count_missing else result.failed
    if len(lost) == HOPELESS:
        way_on = " on_bad_image=skip goes on beyond those that the server does not have." if count_missing else ""
        raise UnreachableError(
            f"the first {len(lost)} images all failed; is the address right?{way_on} One of them: {lost[-1][1]}"
        )


def _fetch(picture: Picture, fetcher: Fetcher) -> int:
    """Bytes of the file that was fetched."""

    def flaw(data: bytes) -> str | None:
        if picture.size and len(data) != picture.size:
            return f"the file has {len(data):,} bytes, the table says {picture.size:,}"
        if picture.md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != hex_of(picture.md5):
            return "the MD5 is not that of the table"
        try:
            # Decoded in full, and shrunk to nothing.
            decode_bytes(np.frombuffer(data, dtype=np.uint8), (1, 1), (1, 1), name=picture.image_id)
        except UnreadableImageError as error:
            return str(error)
        return None

    data = fetcher.read(picture.url, verify=flaw)
    part = picture.target.with_name(f"{picture.target.name}.part")
    part.write_bytes(data)
    part.replace(picture.target)
    return len(data)
