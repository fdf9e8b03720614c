"""Conversion: the files of one layout -> :class:`DetectionSet` -> the files of another layout.

Image files are copied or linked, never encoded again.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retinaflow.data.formats.as_written import writable
from retinaflow.data.formats.checks import check
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.known_formats import image_paths, read_source, write_annotations
from retinaflow.data.formats.published import read_published, without_unknown_images
from retinaflow.data.formats.splits import with_validation_split
from retinaflow.data.image_headers import depth_notice
from retinaflow.data.image_sizes import THREADS
from retinaflow.data.openimages import HIERARCHY_FILES
from retinaflow.data.spreadsheets import for_spreadsheet
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError, SettingError
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig, Layout, Placing


def convert(
    config: ConvertConfig,
    path: Path,
    folder: Path,
    *,
    layout: Layout,
    target: Layout,
    stop: Callable[[], None] = lambda: None,
) -> tuple[DetectionSet, RowErrors]:
    """Read the file or folder ``path`` of a layout, verify it, split it, and write it to ``folder`` as ``target``.

    Returns the set, and the rows and images that were left out. ``stop`` may raise to end it. Raises DataError for a
    file that breaks a rule.
    """
    errors = RowErrors(config.on_bad_row)
    found = _read(config, path, layout, target, errors)
    stop()
    found = with_validation_split(found, fraction=config.validation_fraction, seed=config.seed)
    if target == "openimages":
        found = without_unknown_images(found)
    if not len(found.images):
        raise DataError(
            f"data={path}: at least one image must remain, but none has a box or a label that is known; give "
            "exhaustive=true if images without objects are meant"
        )
    put_images(image_paths(found, target, folder), config.image_files, after_image=stop)
    write_annotations(found, target, folder, first_pixel=config.voc_first_pixel)
    _copy_hierarchy(path if path.is_dir() else path.parent, folder)
    if errors.found:
        for_spreadsheet(errors.frame()).to_csv(folder / "dropped.csv", index=False)
        report(f"{errors.count:,} boxes or images were left out; dropped.csv in {config.output} lists them")
    return found, errors


def _read(config: ConvertConfig, path: Path, layout: Layout, target: Layout, errors: RowErrors) -> DetectionSet:
    if layout == "openimages":
        return writable(read_published(config, path, target, errors), target, errors)
    source = read_source(config, path, layout, errors)
    if not source.images:
        errors.settle()
        raise DataError(f"data={path}: the {layout} files must list at least one image, but list none")
    report(f"{layout}: {len(source.images):,} images, {len(source.boxes):,} boxes")
    files = np.array([str(image.file) for image in source.images if image.file], dtype=np.str_)
    if notice := depth_notice(files, Path()):
        report(notice)
    return check(config, source, errors, target=target)


def _copy_hierarchy(source: Path, folder: Path) -> None:
    """Copy the class hierarchy if there is one: every layout keeps the class ids that it names."""
    for name in HIERARCHY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def put_images(
    pairs: Sequence[tuple[Path, Path]],
    how: Placing,
    *,
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
        for _ in tqdm(threads.map(put, pairs), total=len(pairs), desc="images", disable=None, leave=False):
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
