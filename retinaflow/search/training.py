"""One training of a trial: with its own bins, evaluated over those of the defaults; its checkpoints are deleted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.training_data import TrainingData
from retinaflow.errors import TrainingError
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult
from retinaflow.reports.training_history import log_evaluation
from retinaflow.runs.run import Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.session import ignore, start_session


def train_once(
    settings: TrainConfig, data: TrainingData, run: Run, *, folder: Path, stop: StopRequest, with_history: bool = True
) -> EvaluationResult:
    """Train with some settings and evaluate the best epoch; the weights are deleted.

    ``with_history``: AP per class over time is logged, for one of several seeds.
    The index, its image sizes and the image-class pairs are those of ``data``; only the bins are made again.
    """
    bins = make_bins(data.pairs, num_bins=settings.num_bins, strategy=settings.bin_strategy, edges=settings.bin_edges)
    own = replace(data, bins=bins, scored_bins=data.scored_bins or data.bins)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
        # A killed trial starts from the beginning, so checkpoints within its epochs would only cost time.
        session = start_session(settings.model_copy(update={"save_minutes": 0.0}), own, None)
        log = partial(log_evaluation, run, own.evaluated, images=False) if with_history else ignore
        try:
            best = session.train(run, Path(checkpoints), stop, after_evaluation=log)
        except TrainingError as error:
            raise TrainingError(f"{error} The checkpoints of a trial are deleted.") from None
        return session.evaluate_best(best, stop).evaluation


def log_trial(run: Run, results: Sequence[EvaluationResult], metrics: Mapping[str, float]) -> None:
    """The final results of one or several trainings: means as ``best/`` metrics and in ``per_class_ap.csv``."""
    run.log_metrics({f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}, step=0)
    table = results[0].table.copy()
    table["ap"] = np.mean([result.table["ap"].to_numpy(dtype=np.float64) for result in results], axis=0)
    run.log_csv(table, "per_class_ap.csv")
    run.log_table(table, "per_class_ap.json")
    if len(results) > 1:
        seeds = {f"ap_seed_{n}": result.table["ap"] for n, result in enumerate(results)}
        run.log_csv(pd.concat([table[["class", "class_id"]], pd.DataFrame(seeds)], axis=1), "per_seed_ap.csv")
