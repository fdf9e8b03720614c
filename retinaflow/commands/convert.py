"""``convert``: data in the layout of COCO, VOC or YOLO into the layout that ``train`` reads, and back."""

from __future__ import annotations

from pathlib import Path

from retinaflow.data.formats.conversion import convert
from retinaflow.data.formats.known_formats import layout_of
from retinaflow.data.training_data import data_folder
from retinaflow.errors import SettingError
from retinaflow.files import atomic_folder
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.tracking import launched_by_mlflow, start_path_run
from retinaflow.settings.conversion_settings import ConvertConfig, Layout
from retinaflow.settings.data_settings import DataSettings


def run(config: ConvertConfig) -> Path:
    """Read, verify, split, write. Returns the folder written."""
    path = data_folder(DataSettings(data=config.data))
    layout = layout_of(path) if config.source_format == "auto" else config.source_format
    target: Layout = ("coco" if layout == "openimages" else "openimages") if config.to == "auto" else config.to
    if config.output.is_dir() and (present := next(config.output.iterdir(), None)):
        raise SettingError(
            f"output={config.output}: the folder must be new or empty, but holds {present.name}; nothing is overwritten"
        )
    with (
        StopRequest(watch_parent=launched_by_mlflow()) as stop,
        start_path_run("convert", config) as run,
        atomic_folder(config.output) as folder,
    ):
        run.log_params({**config.model_dump(), "source_format": layout, "to": target})
        found, errors = convert(config, path, folder, layout=layout, target=target, stop=stop.check)
        summary = found.summary()
        report(summary.to_string(index=False))
        counts = ("images", "boxes")
        metrics = {f"convert/{row.split}_{name}": getattr(row, name) for row in summary.itertuples() for name in counts}
        run.log_metrics(metrics, step=0)
        run.log_csv(summary, "summary.csv")
        if errors.found:
            run.log_csv(errors.frame(), "dropped.csv")
    report(f"written: {config.output}")
    if target == "openimages":
        report(f"next: python -m retinaflow explore --data {config.output}")
    return config.output
