"""Image files of a set that is written: copied or linked, never encoded again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from retinaflow.data.image_sizes import THREADS
from retinaflow.errors import SettingError

Placing = Literal["copy", "hardlink", "symlink"]


def put_images(
    pairs: Sequence[tuple[Path, Path]],
    how: Placing,
    *,
    quiet: bool = True,
    after_image: Callable[[], None] = lambda: None,
) -> None:
    """Copy, hard-link or symlink each (source, target). ``after_image`` may raise to stop.

    Raises SettingError when there is no room for copies, or hard links are not possible.
    """
    for folder in {target.parent for _, target in pairs}:
        folder.mkdir(parents=True, exist_ok=True)
    if how == "copy" and pairs:
        needed = sum(source.stat().st_size for source, _ in pairs)
        free = shutil.disk_usage(pairs[0][1].parent).free
        if needed > free:
            raise SettingError(
                f"image_files=copy: the copies need {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free; "
                "give image_files=hardlink (on the same disk) or image_files=symlink"
            )

    def put(pair: tuple[Path, Path]) -> None:
        source, target = pair
        if how == "copy":
            shutil.copyfile(source, target)
        elif how == "symlink":
            target.symlink_to(source.resolve())
        else:
            _hard_link(source.resolve(), target)

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in tqdm(threads.map(put, pairs), total=len(pairs), desc="images", disable=quiet, leave=False):
            after_image()


def _hard_link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise SettingError(
                f"image_files=hardlink: {source} cannot be linked to {target.parent}: {error.strerror}; give "
                "image_files=copy or image_files=symlink"
            ) from None
        raise
