"""``explore``: one page about the data before anything is trained on it, ``explore.html``, and its figures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from retinaflow.data import exploration
from retinaflow.data.class_groups import limit_background, select_classes
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import read_split
from retinaflow.progress import report
from retinaflow.reports.data_report import ExploredData, write_sections
from retinaflow.reports.page import Report
from retinaflow.runs.datasets import explored_dataset
from retinaflow.runs.names import run_name
from retinaflow.runs.run import with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import ExploreConfig
from retinaflow.training.fit_to_data import fit_to_data

PAGE = "explore.html"


def run(config: ExploreConfig) -> Path:
    """Read the annotations, write the page, log it. Returns its path."""
    data = _load(config)
    called = run_name("explore", config)
    config = fit_to_data(config, data.index)
    with start_run("explore", config, default_name=called) as run:
        run.log_params(config.model_dump())
        run.log_datasets([explored_dataset(config.model_dump(), data.index)])
        targets = with_folder(run, config)
        splits = ", ".join(config.train_splits)
        page = Report("What is in the data", f"{config.data}: {splits}; classes: {config.class_group}", targets)
        suspicious = write_sections(page, data, config)
        run.log_metrics(_metrics(data, suspicious), step=0)
        for target in targets:
            target.log_text(page.html(), PAGE)
    report(f"report: {config.output / PAGE}")
    return config.output / PAGE


def _load(config: ExploreConfig) -> ExploredData:
    loaded = read_split(config, config.train_splits, with_images=config.samples > 0, fill_in=False)
    index = loaded.index
    if config.class_group != "all":
        index = index.with_classes(select_classes(config.class_group, index.taxonomy, _bins(index, config)))
        index, *_ = limit_background(index, ratio=config.background_ratio, seed=config.seed)
    given, bins = image_class_pairs(index), _bins(index, config)
    return ExploredData(index, given, bins, exploration.class_table(index, given, bins), loaded.dropped)


def _bins(index: AnnotationIndex, config: ExploreConfig) -> ClassBins:
    pairs = image_class_pairs(index, expand=True)
    return make_bins(pairs, num_bins=config.num_bins, strategy=config.bin_strategy)


def _metrics(data: ExploredData, suspicious: pd.DataFrame) -> dict[str, float]:
    index = data.index
    counts = {
        f"explore/{str(rule).replace(' ', '_')}": float(rows)
        for rule, rows in zip(suspicious["rule"], suspicious["rows"], strict=True)
    }
    totals = {"images": len(index), "boxes": len(index.boxes), "labels": len(index.verified_class)}
    return {**{f"explore/{name}": float(value) for name, value in totals.items()}, **counts}
