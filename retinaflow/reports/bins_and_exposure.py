"""Bins and exposure of a run: its frequency bins, and the samples of each class under every sampling strategy."""

from __future__ import annotations

from retinaflow.data.exposure import compare_strategies, exposure_summary, exposure_table
from retinaflow.data.training_data import TrainingData, epoch_length
from retinaflow.progress import report
from retinaflow.reports.class_figures import class_frequency, exposure_curves
from retinaflow.runs.run import Run
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
        report(f"{len(data.dropped):,} rows or images were left out; dropped.csv lists them")


def log_exposure(run: Run, config: SampledDataSettings, data: TrainingData) -> None:
    """``exposure.csv`` (samples per class and strategy), ``exposure_summary.csv`` and their figure."""
    exposures = compare_strategies(
        data.pairs,
        data.bins,
        length=epoch_length(config, data),
        settings=config,
        seed=config.seed,
    )
    summary = exposure_summary(exposures)
    run.log_csv(exposure_table(exposures, data.pairs, data.bins, data.train.taxonomy), "exposure.csv")
    run.log_csv(summary, "exposure_summary.csv")
    run.log_figure(
        exposure_curves(
            {name: exposure.expected_per_class for name, exposure in exposures.items()},
            images_per_class=data.pairs.images_per_class,
        ),
        "exposure.png",
    )
    report(summary.to_string(index=False, float_format="%.3g"))
