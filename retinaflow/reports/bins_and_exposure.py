"""Bins and exposure of a run: its frequency bins, and the samples of each class under every sampling strategy."""

from __future__ import annotations

import numpy as np

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.exposure import (
    PasteExposure,
    compare_strategies,
    exposure_summary,
    exposure_table,
    measure_pastes,
)
from retinaflow.data.sampling import first_balanced_epoch
from retinaflow.data.training_data import TrainingData, epoch_length, plans
from retinaflow.progress import report
from retinaflow.reports.class_figures import class_frequency, exposure_curves
from retinaflow.runs.run import Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.data_settings import SampledDataSettings


def log_bins(run: Run, data: TrainingData) -> None:
    """``bins.json`` and the figure of class frequencies with the bins."""
    bins, taxonomy = data.bins, data.train.taxonomy
    run.log_json(bins.to_document(taxonomy.ids), "bins.json")
    run.log_figure(
        class_frequency(
            bins.images_per_class, edges=bins.edges, bin_of_class=bins.bin_of_class, names=list(taxonomy.labels)
        ),
        "class_frequency.png",
    )
    if data.seen is not None:
        run.log_json({**vars(data.seen), "background_ratio": data.seen.background_ratio}, "group_images.json")
    if len(data.dropped):
        run.log_csv(data.dropped, "dropped.csv")
        report(f"{data.dropped['rows'].sum():,} rows or images were left out; dropped.csv lists them")


def log_exposure(run: Run, config: SampledDataSettings, data: TrainingData) -> None:
    """``exposure.csv`` (samples per class and strategy, for a training with what is pasted and covered),
    ``exposure_summary.csv`` and their figure."""
    exposures = compare_strategies(
        data.pairs,
        data.bins,
        length=epoch_length(config, data),
        settings=config,
        seed=config.seed,
    )
    summary = exposure_summary(exposures)
    pastes = _pastes(config, data) if isinstance(config, TrainConfig) else None
    table = exposure_table(exposures, data.pairs, data.bins, data.train.taxonomy, pastes=pastes)
    run.log_csv(table, "exposure.csv")
    run.log_csv(summary, "exposure_summary.csv")
    run.log_figure(
        exposure_curves(
            {name: exposure.expected_per_class for name, exposure in exposures.items()},
            images_per_class=data.pairs.images_per_class,
        ),
        "exposure.png",
    )
    report(summary.to_string(index=False, float_format="%.3g"))


def _pastes(config: TrainConfig, data: TrainingData) -> PasteExposure | None:
    """What is pasted in the first balanced epoch; None without copy-paste."""
    copy_paste = CopyPaste.by_rarity(data.train, data.bins, probability=config.copy_paste, balance=config.balance)
    if copy_paste is None:
        if config.copy_paste > 0:
            report("copy_paste has no effect: no class is rarer than the others and has a box that can be cropped")
        return None
    sizes = np.asarray(data.train.sizes)
    buckets = AspectBuckets.fit(sizes, image_size=config.image_size, num_buckets=config.num_buckets)
    epoch = first_balanced_epoch(config.epochs, balance_start=config.balance_start)
    pastes = measure_pastes(
        copy_paste,
        plans(config, data)(epoch),
        np.array(buckets.shapes)[buckets.assign(sizes)],
        seed=config.seed,
        epoch=epoch,
        expand=config.parents != "ignore",
    )
    classes = len(np.unique(data.train.labels[copy_paste.rows]))
    report(
        f"copy_paste={config.copy_paste:g}: crops of {len(copy_paste.rows):,} boxes of {classes} classes are pasted "
        f"from epoch {epoch + 1} on; {copy_paste.expected_boxes(epoch_length(config, data)).sum():,.0f} boxes per epoch"
    )
    return pastes
