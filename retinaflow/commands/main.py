"""``main``: does balanced sampling help here? Bins, a uniform and a balanced training, and their AP per bin side by
side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
import torch

from retinaflow.commands import train
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.errors import SettingError
from retinaflow.metric.per_class import class_groups
from retinaflow.progress import report
from retinaflow.reports.bins_and_exposure import log_bins, log_exposure
from retinaflow.runs import store, tracking
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.names import run_name
from retinaflow.runs.run import Run
from retinaflow.settings.commands import MainConfig, TrainConfig
from retinaflow.statistics.bootstrap import paired_differences
from retinaflow.training.fit_to_data import fit_to_data
from retinaflow.training.side_by_side import train_side_by_side

RESAMPLES = 1000


def run(config: MainConfig) -> None:
    """Train twice, as two child runs of one parent run, which gets ``comparison.csv``.

    Raises SettingError for settings that leave nothing to compare.
    """
    if config.sampling == "uniform":
        raise SettingError(
            "main compares a strategy with uniform sampling, but got sampling=uniform; run train for one"
        )
    if config.resume is not None:
        raise SettingError(f"main trains two detectors anew, but got resume={config.resume}; run train to resume one")
    data = load_training_data(config)
    called = run_name("main", config)
    config = fit_to_data(config, data.train)
    # The baseline is what people do without retinaflow: every image has the same weight and the same augmentation.
    plain = {"sampling": "uniform", "rare_augment": config.augment, "copy_paste": 0.0, "register_as": None}
    baseline = config.model_copy(update=plain)
    with tracking.start_run(
        "main", track=config.track, experiment=config.experiment, output=config.output, default_name=called
    ) as parent:
        parent.log_params(config.model_dump())
        parent.log_json(config.model_dump(mode="json"), "config.json")
        parent.set_tags({"retinaflow.data_digest": data.digest})
        parent.log_datasets(training_datasets(config.model_dump(), data))
        log_bins(parent, data)
        log_exposure(parent, config, data)
        uniform, balanced = _trained({"uniform": baseline, config.sampling: config}, data, parent)
        table = sampling_comparison(uniform, balanced, data, names=("uniform", config.sampling), seed=config.seed)
        parent.log_csv(table, "comparison.csv")
        parent.log_metrics({f"val/{row.group}": row[3] for row in table.itertuples(index=False)}, step=0)
    report(
        f"\nAP by frequency bin (bin 1 is the rarest), difference with its 95% interval over images:\n{_shown(table)}"
    )
    if config.track:
        report(f'\nTo look at the runs:  mlflow ui --backend-store-uri {store.uri()}   (pick "Training runs")')


def _trained(trainings: Mapping[str, MainConfig], data: TrainingData, parent: Run) -> Iterable[train.TrainResult]:
    config, names = next(iter(trainings.values())), " and ".join(trainings)
    divisible = torch.get_num_threads() > 1 and config.nproc == 1 and not torch.cuda.is_available()
    if config.side_by_side and divisible:
        report(f"\n{names} sampling, side by side")
        return train_side_by_side(train_anew, trainings, data, parent=parent).values()
    report(f"\n{names} sampling, one after the other")
    return [train_anew(config, data=data, name=name) for name, config in trainings.items()]


def train_anew(config: TrainConfig, *, data: TrainingData, name: str) -> train.TrainResult:
    """One of the two trainings."""
    result = train.run(config, data=data, name=name)
    assert result is not None, "only resume=auto finds a finished training"
    return result


def sampling_comparison(
    first: train.TrainResult, second: train.TrainResult, data: TrainingData, *, names: tuple[str, str], seed: int
) -> pd.DataFrame:
    """One row per group of classes (bins, thirds, all): both APs, the difference, its paired bootstrap interval."""
    bins = data.bins
    groups = class_groups(bins.images_per_class, bins.bin_of_class, class_ids=data.train.taxonomy.ids)
    found = paired_differences(
        first.evaluation.scores.matches,
        second.evaluation.scores.matches,
        groups=groups,
        resamples=RESAMPLES,
        seed=seed,
    )
    differences = {**found.groups, "mAP": found.mean}
    ordered = sorted((name for name in differences if f"val/{name}" in first.evaluation.metrics), key=_bins_first)
    return pd.DataFrame(
        [
            {
                "group": name,
                "classes": int(groups[name].sum()) if name in groups else first.evaluation.scores.num_classes_in_mean,
                names[0]: first.evaluation.metrics[f"val/{name}"],
                names[1]: second.evaluation.metrics[f"val/{name}"],
                "difference": differences[name].estimate,
                "low": differences[name].low,
                "high": differences[name].high,
            }
            for name in ordered
        ]
    )


def _bins_first(name: str) -> tuple[int, str]:
    return (0 if "bin" in name else 2 if name == "mAP" else 1), name


def _shown(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.3f}")
