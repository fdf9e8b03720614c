"""Image files: fetched by several connections, verified, and written atomically.

A file gets its name only after its length, its MD5 where it is known, and its decoding were verified. So a download
that was stopped resumes with the files that are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from retinaflow.data.download.http import Fetcher, MissingFileError, UnreachableError, hex_of
from retinaflow.data.download.request import Request
from retinaflow.data.images import UnreadableImageError, decode_bytes
from retinaflow.errors import DataError, SettingError
from retinaflow.files import atomic_file
from retinaflow.progress import report

MAX_FAILURES = 20
"""Images that may fail before the first one is fetched; then the download ends."""
SAMPLED = 12
"""Images whose sizes are requested to estimate the size of all."""


@dataclass(frozen=True)
class RemoteImage:
    """One image to fetch; ``size`` (bytes) and ``md5`` (base64) where they are known, else 0 and empty."""

    image_id: str
    url: str
    target: Path
    size: int = 0
    md5: str = ""

    @property
    def is_fetched(self) -> bool:
        """Whether the file is there."""
        return self.target.is_file()


@dataclass
class Fetched:
    """Result for the images that were not there: (image id, reason) of those without a file."""

    count: int = 0
    bytes: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    """The server does not have them."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """They could not be read whole; another attempt may succeed."""

    def table(self) -> pd.DataFrame:
        """Columns image_id, reason: what is written as ``missing.csv``."""
        return pd.DataFrame([*self.missing, *self.failed], columns=["image_id", "reason"])


def report_amount(request: Request, images: Sequence[RemoteImage], chosen: Mapping[str, Sequence[str]]) -> None:
    """Report how many images and bytes are to be fetched. Raises SettingError when the disk has no room for them."""
    if not images:
        raise DataError("no image of these classes or ids is in the tables of the chosen splits")
    wanted = [image for image in images if not image.is_fetched]
    known = sum(image.size for image in wanted)
    source = "by the table"
    if not known and wanted:
        sample = random.Random(request.config.seed).sample(wanted, min(SAMPLED, len(wanted)))
        sizes = [size for image in sample if (size := _size(request.fetcher, image))]
        known = round(sum(sizes) / len(sizes) * len(wanted)) if sizes else 0
        source = f"by {len(sizes)} of them"
    counts = ", ".join(f"{len(ids):,} of {split}" for split, ids in chosen.items())
    present = f", {len(images) - len(wanted):,} are there already" if len(wanted) < len(images) else ""
    amount = f"about {known / 2**20:,.1f} MiB {source}" if known else "of unknown size"
    report(
        f"{len(wanted):,} images to fetch ({counts}{present}), {amount}, {request.config.connections} at the same time"
    )
    free = shutil.disk_usage(request.folder).free
    if known > free:
        raise SettingError(
            f"output={request.folder}: the disk must have {known / 2**30:.1f} GiB free, but has {free / 2**30:.1f} GiB"
        )


def _size(fetcher: Fetcher, image: RemoteImage) -> int | None:
    with contextlib.suppress(DataError):
        return fetcher.size(image.url)
    return None


def fetch_images(
    images: Sequence[RemoteImage],
    fetcher: Fetcher,
    *,
    connections: int,
    skip: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Fetched:
    """Fetch the images that are not there yet. ``check`` may raise to end it.

    Raises UnreachableError when the first :data:`MAX_FAILURES` all fail. Images that the server does not have count as
    failures only without ``skip`` and when no image was there before; when some were, none counts with ``skip``.
    """
    result = Fetched()
    wanted = [image for image in images if not image.is_fetched]
    # After an earlier attempt all that is left may be images that the server does not have.
    is_first = len(wanted) == len(images)
    threads = ThreadPoolExecutor(connections)
    try:
        futures = {threads.submit(_fetch, image, fetcher): image for image in wanted}
        for future in tqdm(as_completed(futures), total=len(wanted), desc="images", disable=None, leave=False):
            check()
            image = futures[future]
            try:
                result.bytes += future.result()
                result.count += 1
            except MissingFileError as error:
                result.missing.append((image.image_id, str(error)))
            except UnreachableError as error:
                result.failed.append((image.image_id, str(error)))
            if not result.count and (is_first or not skip):
                _end_if_all_fail(result, count_missing=is_first and not skip)
    finally:
        # Images that wait for a thread or for a retry are given up at once.
        fetcher.stopped.set()
        threads.shutdown(wait=True, cancel_futures=True)
        fetcher.stopped.clear()
    return result


def _end_if_all_fail(result: Fetched, *, count_missing: bool) -> None:
    """Raises UnreachableError when so many have failed that probably all will."""
    lost = [*result.missing, *result.failed] if count_missing else result.failed
    if len(lost) == MAX_FAILURES:
        hint = " on_bad_image=skip leaves out those that the server does not have." if count_missing else ""
        raise UnreachableError(
            f"the first {len(lost)} images all failed; check images_url.{hint} One of them: {lost[-1][1]}"
        )


def _fetch(image: RemoteImage, fetcher: Fetcher) -> int:
    """Fetch, verify and write one image. Returns its bytes."""

    def flaw(data: bytes) -> str | None:
        if image.size and len(data) != image.size:
            return f"the file has {len(data):,} bytes, but {image.size:,} in the table"
        if image.md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != hex_of(image.md5):
            return "the MD5 is not that of the table"
        try:
            # Decodes all pixels.
            decode_bytes(np.frombuffer(data, dtype=np.uint8), None, (1, 1), name=image.image_id)
        except UnreadableImageError as error:
            return str(error)
        return None

    data = fetcher.read(image.url, verify=flaw)
    with atomic_file(image.target) as partial:
        partial.write_bytes(data)
    return len(data)


def verify_fetched(request: Request, images: Sequence[RemoteImage], fetched: Fetched) -> None:
    """Raises UnreachableError when no image is there, and when another attempt may fetch more."""
    if not any(image.is_fetched for image in images):
        raise UnreachableError(
            f"the {len(images):,} images all failed; check images_url. missing.csv has the reasons, for example: "
            f"{(fetched.failed or fetched.missing)[0][1]}"
        )
    if fetched.failed and request.config.on_bad_image == "stop":
        image_id, reason = fetched.failed[0]
        raise UnreachableError(
            f"{len(fetched.failed):,} images could not be read whole, {image_id} for example: {reason}. Start the same "
            "command again to fetch what is missing, or give on_bad_image=skip"
        )
