"""``convert``: data in the layout of COCO, VOC or YOLO into the layout that ``train`` reads, and back."""

from __future__ import annotations

import sys
from pathlib import Path

from retinaflow.data.formats.conversion import (
    copy_hierarchy,
    image_paths,
    read_set,
    with_validation_split,
    without_unknown_images,
    write_annotations,
)
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.image_files import put_images
from retinaflow.data.formats.layout import layout_of
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import data_folder
from retinaflow.errors import SettingError
from retinaflow.files import atomic_folder
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.runs.tracking import launched_by_mlflow, start_data_run
from retinaflow.settings.data_commands import ConvertConfig, Layout
from retinaflow.settings.groups import DataSettings


def run(config: ConvertConfig) -> Path:
    """Read, verify, split, write. Returns the folder written."""
    quiet = not sys.stderr.isatty()
    path = data_folder(DataSettings(data=config.data))
    layout = layout_of(path) if config.source_format == "auto" else config.source_format
    target: Layout = ("coco" if layout == "openimages" else "openimages") if config.to == "auto" else config.to
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise SettingError(f"output={config.output}: the folder must be new or empty; nothing is overwritten")
    with (
        StopRequest(watch_parent=launched_by_mlflow()) as stop,
        start_data_run("convert", track=config.track, experiment=config.experiment, folder=config.output) as run,
        atomic_folder(config.output) as folder,
    ):
        run.log_params({**config.model_dump(), "source_format": layout, "to": target})
        errors = RowErrors(config.on_bad_row)
        found = read_set(config, path, layout, target, errors, quiet=quiet)
        stop.check()
        found = with_validation_split(found, fraction=config.validation_fraction, seed=config.seed)
        if target == "openimages":
            found = without_unknown_images(found)
        put_images(image_paths(found, target, folder), config.image_files, quiet=quiet, after_image=stop.check)
        write_annotations(found, target, folder, first_pixel=config.voc_first_pixel)
        copy_hierarchy(path, folder)
        _log(run, found, errors, folder, config)
    report(f"written: {config.output}")
    if target == "openimages":
        report(f"next: python -m retinaflow explore --data {config.output}")
    return config.output


def _log(run: Run, found: DetectionSet, errors: RowErrors, folder: Path, config: ConvertConfig) -> None:
    summary = found.summary()
    report(summary.to_string(index=False))
    counts = ("images", "boxes")
    metrics = {f"convert/{row.split}_{name}": getattr(row, name) for row in summary.itertuples() for name in counts}
    run.log_metrics(metrics, step=0)
    run.log_csv(summary, "summary.csv")
    if errors.found:
        errors.frame().to_csv(folder / "dropped.csv", index=False)
        run.log_csv(errors.frame(), "dropped.csv")
        report(f"{len(errors.found):,} boxes or images were left out; dropped.csv in {config.output} lists them")
