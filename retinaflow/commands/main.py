"""``main``: does balanced sampling help here? Bins, a uniform and a balanced training, and their AP per bin side by
side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import pandas as pd
import torch

from retinaflow.commands import train
from retinaflow.comparison.comparison import Resampling, Side, compare_runs
from retinaflow.comparison.stored_matches import StoredMatches, read_matches
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.errors import SettingError
from retinaflow.progress import report
from retinaflow.reports.bins_and_exposure import log_bins, log_exposure
from retinaflow.runs import store
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.names import run_name
from retinaflow.runs.run import Run
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import MainConfig, TrainConfig
from retinaflow.training.earlier_training import own_training, training_key
from retinaflow.training.fit_to_data import fit_to_data
from retinaflow.training.resume import AUTO
from retinaflow.training.side_by_side import train_side_by_side


def run(config: MainConfig) -> None:
    """Train twice, as two child runs of one parent run, which gets ``comparison.csv``. With ``resume=auto`` a training
    that the same command has begun is resumed, and one that it has finished is not trained again.

    Raises SettingError for settings that leave nothing to compare.
    """
    if config.sampling == "uniform":
        raise SettingError(
            "main compares a strategy with uniform sampling, but got sampling=uniform; run train for one"
        )
    if config.resume not in (None, AUTO):
        raise SettingError(
            f"main resumes its own two trainings with resume=auto, but got resume={config.resume}; train resumes one"
        )
    data = load_training_data(config)
    called = run_name("main", config)
    config = fit_to_data(config, data.train)
    # The baseline is what people do without retinaflow: every image has the same weight and the same augmentation.
    plain = {"sampling": "uniform", "rare_augment": config.augment, "loss": "focal", "copy_paste": 0.0}
    baseline = config.model_copy(update=plain | {"register_as": None})
    with start_run("main", config, default_name=called) as parent:
        parent.log_params(config.model_dump())
        parent.log_json(config.model_dump(mode="json"), "config.json")
        parent.set_tags({"retinaflow.data_digest": data.digest})
        parent.log_datasets(training_datasets(config.model_dump(), data))
        log_bins(parent, data)
        log_exposure(parent, config, data)
        found = _trained({"uniform": baseline, config.sampling: config}, data, parent)
        table = sampling_comparison(found, seed=config.seed)
        parent.log_csv(table, "comparison.csv")
        parent.log_metrics({f"val/{row.group}": row[3] for row in table.itertuples(index=False)}, step=0)
    report(
        f"\nAP by frequency bin (bin 1 is the rarest), difference with its 95% interval over images:\n{_shown(table)}"
    )
    if config.track:
        report(f'\nTo look at the runs:  mlflow ui --backend-store-uri {store.uri()}   (pick "Training runs")')


def _trained(trainings: Mapping[str, MainConfig], data: TrainingData, parent: Run) -> dict[str, StoredMatches]:
    """The matches of both trainings by name, earlier ones with ``resume=auto``."""
    found: dict[str, StoredMatches] = {}
    waiting: dict[str, TrainConfig] = {}
    with ExitStack() as owned:
        for name, config in trainings.items():
            # A checkpoint of ``main`` is that of a training like any other.
            own = config.part(TrainConfig)
            earlier = owned.enter_context(own_training(training_key(own, data.digest), own))
            if earlier.finished is None:
                waiting[name] = earlier.config
            else:
                report(
                    f"{name}: {earlier.finished} has these settings and data and is finished; it is not trained again"
                )
                found[name] = read_matches(earlier.finished if own.track else str(own.output / earlier.finished))
        results = _trained_now(waiting, data, parent, side_by_side=next(iter(trainings.values())).side_by_side)
        return {name: found.get(name) or results[name].matches for name in trainings}


def _trained_now(
    trainings: Mapping[str, TrainConfig], data: TrainingData, parent: Run, *, side_by_side: bool
) -> dict[str, train.TrainResult]:
    names = " and ".join(trainings)
    divisible = torch.get_num_threads() > 1 and not torch.cuda.is_available()
    if side_by_side and divisible and len(trainings) > 1 and all(config.nproc == 1 for config in trainings.values()):
        report(f"\n{names} sampling, side by side")
        return train_side_by_side(train_now, trainings, data, parent=parent)
    if trainings:
        report(f"\n{names} sampling" + (", one after the other" if len(trainings) > 1 else ""))
    return {name: train_now(config, data=data, name=name) for name, config in trainings.items()}


def train_now(config: TrainConfig, *, data: TrainingData, name: str) -> train.TrainResult:
    """One of the two trainings."""
    result = train.run(config, data=data, name=name)
    assert result is not None, "only resume=auto finds a finished training"
    return result


def sampling_comparison(found: Mapping[str, StoredMatches], *, seed: int) -> pd.DataFrame:
    """One row per group of classes (bins, thirds, all): both APs, the difference, its paired bootstrap interval."""
    (first, second), runs = found, [(matches,) for matches in found.values()]
    groups = compare_runs([Side("A", first, runs[0]), Side("B", second, runs[1])], Resampling(seed=seed)).groups
    names = {
        "A": first,
        "B": second,
        "B_difference": "difference",
        "B_difference_low": "low",
        "B_difference_high": "high",
    }
    return groups[["group", "classes", *names]].rename(columns=names)


def _shown(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.3f}")
