"""A folder that appears whole or not at all, and image files put into it without being encoded again."""

from __future__ import annotations

import errno
import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from retinaflow.data.image_sizes import THREADS
from retinaflow.settings.data_commands import Placing


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that becomes it when the block ends well, and is removed when it does not.

    One that a killed process of this machine left behind is removed first.

    Raises FileExistsError where ``target`` is a file or a folder that holds anything.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"output={target}: the folder must be new or empty; nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-{platform.node()}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    made = target.with_name(f"{prefix}{os.getpid()}")
    made.mkdir()
    try:
        yield made
        # A rename puts the folder in the place of an empty one, and fails where another process has filled it.
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process of this machine may still write, by its number; where that cannot be asked, it may."""
    if not process.isdecimal() or os.name == "nt":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    # A number that has come round to this process is of one that has ended.
    return int(process) != os.getpid()


def place_images(
    pairs: Sequence[tuple[Path, Path]],
    how: Placing,
    *,
    quiet: bool = True,
    after_image: Callable[[], None] = lambda: None,
) -> None:
    """Each (source, target): a copy, a second name of the same file, or a link to it; bytes are never changed.

    ``after_image`` may raise to stop.

    Raises OSError when there is no room for copies, or no second name is possible.
    """
    for folder in {target.parent for _, target in pairs}:
        folder.mkdir(parents=True, exist_ok=True)
    if how == "copy" and pairs:
        needed = sum(source.stat().st_size for source, _ in pairs)
        free = shutil.disk_usage(pairs[0][1].parent).free
        if needed > free:
            raise OSError(
                f"copies of the images need {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free; give "
                "image_files=hardlink (on the same disk) or image_files=symlink"
            )

    def place(pair: tuple[Path, Path]) -> None:
        source, target = pair
        if how == "copy":
            shutil.copyfile(source, target)
        elif how == "symlink":
            target.symlink_to(source.resolve())
        else:
            _second_name(source.resolve(), target)

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in tqdm(threads.map(place, pairs), total=len(pairs), desc="images", disable=quiet, leave=False):
            after_image()


def _second_name(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise OSError(
                f"{source} cannot be hard-linked to {target.parent}: {error.strerror}; give image_files=copy or symlink"
            ) from None
        raise
