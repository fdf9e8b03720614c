"""``download``: images and annotations of Open Images, by classes or by ids, into the layout that ``train`` reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from retinaflow.data.download.http import Fetcher
from retinaflow.data.download.images import Fetched, fetch_images, report_amount, verify_fetched
from retinaflow.data.download.request import Request, is_complete, mark_complete, read_ids
from retinaflow.data.download.selection import images_to_fetch, remote_images, without_url
from retinaflow.data.download.tables import fetch_boxes, fetch_classes, write_annotations, write_classes
from retinaflow.data.spreadsheets import for_spreadsheet
from retinaflow.errors import SettingError
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.runs.tracking import launched_by_mlflow, start_path_run
from retinaflow.settings.conversion_settings import DownloadConfig


def run(config: DownloadConfig) -> Path:
    """Read the tables, report the amount, fetch the images, write the tables. Returns the folder."""
    if config.class_group is None and config.image_ids is None:
        raise SettingError(
            "class_group or image_ids must be given, for example class_group=Rose,Taxi or image_ids=ids.txt"
        )
    ids = read_ids(config.image_ids)
    fetcher = Fetcher(retries=config.retries, timeout=config.timeout)
    if is_complete(config, ids):
        report(f"{config.output} is complete: the same command has fetched it before")
        return config.output
    with (
        start_path_run("download", config) as run,
        StopRequest(watch_parent=launched_by_mlflow()) as stop,
    ):
        run.log_params(config.model_dump())
        if _fetch(Request(config, fetcher, ids, stop.check), run):
            report(f"written: {config.output}\nnext: python -m retinaflow explore --data {config.output}")
    return config.output


def _fetch(request: Request, run: Run) -> bool:
    """Whether the folder is complete; False after a dry run."""
    config = request.config
    splits: tuple[str, ...] = config.splits
    request.work.mkdir(exist_ok=True)
    taxonomy, classes = fetch_classes(request)
    boxes = {split: fetch_boxes(request, split, classes) for split in splits}
    asked = {split: images_to_fetch(request, boxes[split], taxonomy, classes) for split in splits}
    images = [image for split in splits for image in remote_images(request, split, asked[split])]
    lacking = without_url(request, images, asked)
    chosen = {split: [name for name in names if name not in lacking] for split, names in asked.items()}
    report_amount(request, images, chosen)
    if config.dry_run:
        return False
    fetched = fetch_images(
        images,
        request.fetcher,
        connections=config.connections,
        skip=config.on_bad_image == "skip",
        check=request.check,
    )
    fetched.missing += sorted(lacking.items())
    _log_missing(request, fetched, run)
    verify_fetched(request, images, fetched)
    present = frozenset(image.image_id for image in images if image.is_fetched)
    for split in splits:
        write_annotations(request, split, classes, frozenset(chosen[split]), present)
    write_classes(request, classes or taxonomy.ids)
    mark_complete(request.folder)
    shutil.rmtree(request.work)
    run.log_metrics({"download/images": fetched.count, "download/bytes": fetched.bytes}, step=0)
    return True


def _log_missing(request: Request, fetched: Fetched, run: Run) -> None:
    report(f"{fetched.count:,} images fetched, {fetched.bytes / 2**20:,.1f} MiB")
    (request.folder / "missing.csv").unlink(missing_ok=True)
    missing = fetched.table()
    if len(missing):
        for_spreadsheet(missing).to_csv(request.folder / "missing.csv", index=False)
        run.log_csv(missing, "missing.csv")
        report(f"{len(missing):,} images could not be fetched; missing.csv lists them")
