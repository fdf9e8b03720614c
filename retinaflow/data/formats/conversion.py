"""Conversion: the files of one layout -> :class:`DetectionSet` -> the files of another layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retinaflow.data.formats.as_written import writable
from retinaflow.data.formats.checks import check
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.image_files import put_images
from retinaflow.data.formats.known_formats import image_paths, read_source, write_annotations
from retinaflow.data.formats.published import read_published, without_unknown_images
from retinaflow.data.formats.splits import with_validation_split
from retinaflow.data.image_headers import depth_notice
from retinaflow.data.openimages import HIERARCHY_FILES
from retinaflow.data.spreadsheets import for_spreadsheet
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig, Layout


def convert(
    config: ConvertConfig,
    path: Path,
    folder: Path,
    *,
    layout: Layout,
    target: Layout,
    stop: Callable[[], None] = lambda: None,
    quiet: bool = True,
) -> tuple[DetectionSet, RowErrors]:
    """Read the file or folder ``path`` of a layout, verify it, split it, and write it to ``folder`` as ``target``.

    Returns the set, and the rows and images that were left out. ``stop`` may raise to end it. Raises DataError for a
    file that breaks a rule.
    """
    errors = RowErrors(config.on_bad_row)
    found = _read(config, path, layout, target, errors, quiet=quiet)
    stop()
    found = with_validation_split(found, fraction=config.validation_fraction, seed=config.seed)
    if target == "openimages":
        found = without_unknown_images(found)
    if not len(found.images):
        raise DataError(
            f"data={path}: at least one image must remain, but none has a box or a label that is known; give "
            "exhaustive=true if images without objects are meant"
        )
    put_images(image_paths(found, target, folder), config.image_files, quiet=quiet, after_image=stop)
    write_annotations(found, target, folder, first_pixel=config.voc_first_pixel)
    _copy_hierarchy(path if path.is_dir() else path.parent, folder)
    if errors.found:
        for_spreadsheet(errors.frame()).to_csv(folder / "dropped.csv", index=False)
        report(f"{errors.count:,} boxes or images were left out; dropped.csv in {config.output} lists them")
    return found, errors


def _read(
    config: ConvertConfig, path: Path, layout: Layout, target: Layout, errors: RowErrors, *, quiet: bool
) -> DetectionSet:
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
    return check(
        source,
        errors,
        target=target,
        exhaustive=not source.federated if config.exhaustive == "auto" else config.exhaustive,
        on_bad_image=config.on_bad_image,
        orientation=config.orientation,
        report=report,
        quiet=quiet,
    )


def _copy_hierarchy(source: Path, folder: Path) -> None:
    """Copy the class hierarchy if there is one: every layout keeps the class ids that it names."""
    for name in HIERARCHY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
