"""The cost of a search: number of images, and time from the speed of the defaults on a few batches."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinaflow.data.training_data import TrainingData, epoch_length, load_training_data
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.run import FolderRun
from retinaflow.search.sampler_and_pruner import evaluations
from retinaflow.search.space import read_space
from retinaflow.search.training import train_once
from retinaflow.settings.commands import SearchConfig, TrainConfig
from retinaflow.training.fit_to_data import fit_to_data

TIMED_BATCHES = 6
QUICKEST = 1e-4
"""Lower bound of a measured time per image in seconds."""
TIMED_EVALUATED = 96
"""Number of evaluated images whose time is measured: enough to exceed the noise of two trainings."""


def estimate(config: SearchConfig, stop: StopRequest) -> None:
    """Print the images and time of all trials and of the comparison at the end. Creates neither a study nor a run."""
    data = load_training_data(read_space(config).base)
    settings = read_space(fit_to_data(config, data.train)).base
    trainings = config.trials * config.seeds + 2 * config.confirm_seeds
    trained = epoch_length(settings, data) * settings.epochs
    evaluated = len(data.evaluated) * evaluations(settings)
    with stop:
        per_trained, per_evaluated = measure(settings, data, stop)
    seconds = trained * per_trained + evaluated * per_evaluated
    report(
        f"{config.trials} trials of {config.seeds} training(s) each, then {2 * config.confirm_seeds} to compare the "
        f"best with the defaults\n"
        f"a training sees {trained:,} images and evaluates {evaluated:,}; together {trainings * trained:,} and "
        f"{trainings * evaluated:,}\n"
        f"measured: {1 / per_trained:.1f} images/s trained, {1 / per_evaluated:.1f} images/s evaluated, so "
        f"{shown(seconds)} a training\n"
        f"at most about {shown(trainings * seconds)} in all with one worker, as pruned trials end earlier; "
        f"{config.search_workers} worker(s) divide the cores of this machine"
    )


def measure(settings: TrainConfig, data: TrainingData, stop: StopRequest) -> tuple[float, float]:
    """Seconds per training image and per evaluated image, from short trainings that differ in one number."""
    batch = settings.batch_size
    few = min(TIMED_EVALUATED, len(data.evaluated))
    # The first one also loads libraries and fills caches.
    plans = ((batch, 1), (batch, 1), (batch * TIMED_BATCHES, 1), (batch, few))
    _, base, more_trained, more_evaluated = (_time(settings, data, stop, length=a, evaluated=b) for a, b in plans)
    per_trained = (more_trained - base) / (batch * (TIMED_BATCHES - 1))
    per_evaluated = (more_evaluated - base) / max(few - 1, 1)
    return max(per_trained, QUICKEST), max(per_evaluated, QUICKEST)


def shown(seconds: float) -> str:
    """A duration as text in seconds, minutes or hours."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _time(settings: TrainConfig, data: TrainingData, stop: StopRequest, *, length: int, evaluated: int) -> float:
    short = settings.model_copy(update={"epochs": 1, "epoch_length": length, "eval_every": 1})
    few = replace(data, evaluated=data.evaluated.take(np.arange(evaluated)))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train_once(short, few, FolderRun(Path(folder) / "run"), folder=Path(folder), stop=stop)
        return time.perf_counter() - start
