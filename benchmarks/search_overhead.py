"""What a search costs beside training and evaluating, per trial, on sqlite.

    python benchmarks/search_overhead.py --trials 20

Runs a search of tiny trainings in a folder of its own, MLflow store included. Prints wall and CPU seconds per trial
that were spent neither in training nor in evaluating: asking the sampler, the lock, runs in MLflow, tables, the study.
Wall seconds only mean something on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import retinaflow.search.objective as objective
from retinaflow.commands import search
from retinaflow.runs import store
from retinaflow.settings.commands import SearchConfig
from retinaflow.settings.resolve import resolve

TINY = {"image_size": 64, "num_buckets": 1, "epochs": 2, "epoch_length": 8, "batch_size": 4, "class_group": "bin:7"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    trials = parser.parse_args().trials
    spent = [0.0, 0.0]
    train_once = objective.train_once

    def timed(*words: object, **named: object) -> object:
        start = time.perf_counter(), time.process_time()
        try:
            return train_once(*words, **named)  # type: ignore[arg-type]
        finally:
            spent[0] += time.perf_counter() - start[0]
            spent[1] += time.process_time() - start[1]

    objective.train_once = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        store.use(f"sqlite:///{Path(folder) / 'mlflow.db'}")
        for number in (1, trials + 1):
            # The first makes the stores and the caches.
            given = {**TINY, "trials": number, "confirm_seeds": 0, "pruner": "none", "objective": "val/mAP"}
            spent[:] = 0.0, 0.0
            start = time.perf_counter(), time.process_time()
            search.run(resolve(SearchConfig, given))
        wall, cpu = time.perf_counter() - start[0] - spent[0], time.process_time() - start[1] - spent[1]
        os.chdir("/")
    print(
        f"{wall / trials:.2f} s wall, {cpu / trials:.2f} s CPU per trial beside training and evaluating, "
        f"{trials} trials"
    )


if __name__ == "__main__":
    main()
