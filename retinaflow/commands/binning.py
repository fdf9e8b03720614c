"""``binning``: frequency bins of the classes, and the exposure of each class under every sampling strategy."""

from __future__ import annotations

from retinaflow.data.training_data import load_training_data
from retinaflow.reports.bins_and_exposure import log_bins, log_exposure
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.names import run_name
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import BinningConfig


def run(config: BinningConfig) -> None:
    """Log bins and exposure, and print a comparison of the strategies."""
    data = load_training_data(config, need_images=False)
    with start_run("binning", config, default_name=run_name("binning", config)) as run:
        run.log_params(config.model_dump())
        run.log_datasets(training_datasets(config.model_dump(), data))
        log_bins(run, data)
        log_exposure(run, config, data)
