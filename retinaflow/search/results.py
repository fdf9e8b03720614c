"""The results of a search at its parent run: ``trials.csv``, figures, ``best.yaml``, the front of two objectives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.trial import FrozenTrial, TrialState

from retinaflow.progress import report
from retinaflow.reports.search_figures import contour, history, importance, pareto, slices
from retinaflow.search import confirmation
from retinaflow.search.space import SEARCHABLE, Range
from retinaflow.search.stages import gained_nothing
from retinaflow.search.study import Search
from retinaflow.search.trial import (
    METRICS,
    OVERHEAD,
    REASON,
    RETRY_OF,
    RUN_ID,
    SECONDS,
    TRAININGS,
    all_equal,
    best_trial,
    meets_floor,
    state_of,
    states_of,
)
from retinaflow.settings.commands import ABOUT_DATA, WITHOUT_EFFECT, TrainConfig
from retinaflow.settings.value_types import as_text

FEWEST_FOR_IMPORTANCE = 4
"""Number of complete trials below which importances are not computed."""
_NOT_IN_BEST = WITHOUT_EFFECT - ABOUT_DATA


def report_best(search: Search) -> None:
    """Print the best trial, or why there is none."""
    best, names = best_trial(search.study), search.metrics.names
    trials = search.study.get_trials(deepcopy=False)
    trained = [trial.user_attrs[TRAININGS] for trial in trials if TRAININGS in trial.user_attrs]
    saved = len(trained) * search.config.seeds - sum(trained)
    if saved:
        report(f"{saved} of {len(trained) * search.config.seeds} trainings were not needed: their trials were worse")
    if gained_nothing(search, trials):
        report(f"the search stopped: no trial was better in the last {search.config.search_patience} (search_patience)")
    if best is None:
        report("no trial is complete" if search.metrics.floor is None else "no complete trial meets the floor")
        return
    values = ", ".join(f"{name} {value:.4f}" for name, value in zip(names, best.values, strict=True))
    report(f"\nbest trial {best.number}: {values}; its settings are best.yaml at run {search.runs.parent.run_id}")
    if all_equal(search.study):
        report(
            f"all complete trials have the same {', '.join(names)} and cannot be ranked: train them longer (epochs), "
            "with larger images (image_size), or choose another objective"
        )
    elif not confirmation.arms(search):
        report("these are the defaults: no trial was better")


def trials_table(search: Search) -> pd.DataFrame:
    """One row per trial in the order of their numbers: state and reason, objectives, parameters, metrics, cost, run."""
    rows = [_row(trial, search.metrics.names) for trial in search.study.get_trials(deepcopy=False)]
    table = pd.DataFrame(rows)
    params = [name for name in SEARCHABLE if name in table]
    # Whole numbers stay whole beside trials that have none.
    table = table.astype({name: "Int64" for name in ("num_bins", "trainings", "retry_of") if name in table})
    first = ["trial", "state", "reason", *_columns(search.metrics.names), "keeps_floor"]
    return table[[*first, *params, *(name for name in table if name not in {*first, *params})]]


def _row(trial: FrozenTrial, names: Sequence[str]) -> dict[str, Any]:
    attributes = trial.user_attrs
    values = trial.values if trial.state == TrialState.COMPLETE else [math.nan] * len(names)
    return {
        "trial": trial.number,
        "state": state_of(trial),
        "reason": attributes.get(REASON, ""),
        **dict(zip(_columns(names), values, strict=True)),
        "keeps_floor": meets_floor(trial),
        **trial.params,
        **attributes.get(METRICS, {}),
        "trainings": attributes.get(TRAININGS),
        "seconds": attributes.get(SECONDS, math.nan),
        "overhead_seconds": attributes.get(OVERHEAD, math.nan),
        "retry_of": attributes.get(RETRY_OF),
        "run_id": attributes.get(RUN_ID, ""),
    }


def _columns(names: Sequence[str]) -> list[str]:
    """Column names of the objectives in ``trials.csv``."""
    return ["objective", "objective_2"][: len(names)]


def log_results(search: Search) -> None:
    """Log tables, figures and ``best.yaml`` of the trials so far to the parent run; nothing before the first ends."""
    logged: list[FrozenTrial] = []
    # Of several commands on one study, the one that logs last then has the last trial.
    while logged != (ended := [trial for trial in search.study.get_trials() if trial.state.is_finished()]):
        _log_results(search)
        logged = ended


def _log_results(search: Search) -> None:
    run, names, study = search.runs.parent, search.metrics.names, search.study
    table = trials_table(search)
    run.log_csv(table, "trials.csv")
    best = best_trial(study)
    complete = table[table["state"] == "complete"]
    for column, name in zip(_columns(names), names, strict=True):
        run.log_figure(history(table, column, name=name), _file("history", column))
    _log_parameters(search, complete)
    if len(names) > 1 and len(complete):
        front = [trial.number for trial in study.best_trials]
        run.log_csv(table[table["trial"].isin(front)], "pareto.csv")
        run.log_figure(pareto(complete, front, names=names), "pareto.png")
    if best is not None:
        _log_best(search, best)
    run.set_tags({"retinaflow.trials": states_of(study.get_trials(deepcopy=False))})


def _log_parameters(search: Search, complete: pd.DataFrame) -> None:
    """Log importances, and the first objective over each parameter and over the two most important numeric ones."""
    run, name, column = search.runs.parent, search.metrics.names[0], "objective"
    weights = importances(search.study)
    if weights:
        run.log_csv(pd.DataFrame({"parameter": list(weights), "importance": list(weights.values())}), "importance.csv")
        run.log_figure(importance(weights, name=name), "importance.png")
    order = [*weights, *(parameter for parameter in SEARCHABLE if parameter not in weights)]
    shown = [parameter for parameter in order if parameter in complete and complete[parameter].notna().sum() > 1]
    log = [parameter for parameter, domain in search.space.domains.items() if isinstance(domain, Range) and domain.log]
    if len(complete) > 1 and shown:
        run.log_figure(slices(complete, column, shown, name=name, log=log), "slice.png")
        # With settings that only a few trials had the figure would be almost empty.
        common = [parameter for parameter in shown if complete[parameter].notna().sum() > len(complete) / 2]
        numbers = [parameter for parameter in common if pd.api.types.is_numeric_dtype(complete[parameter])]
        if len(numbers) > 1:
            figure = contour(complete, column, (numbers[0], numbers[1]), name=name, log=log)
            run.log_figure(figure, "contour.png")


def importances(study: optuna.Study) -> Mapping[str, float]:
    """Fraction of the variance of the first objective among good trials due to each parameter, largest first
    (PED-ANOVA)."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return {}
    varied = [
        name for name in SEARCHABLE if len({trial.params[name] for trial in complete if name in trial.params}) > 1
    ]
    if not varied or len({trial.values[0] for trial in complete}) == 1:
        return {}
    # Optuna treats low values of a target as good, whatever the direction of the study, and warns of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=varied, target=lambda trial: -trial.values[0])
    return {name: float(weight) for name, weight in found.items()}


def _log_best(search: Search, best: FrozenTrial) -> None:
    """Log ``best.yaml``, a settings file for ``train``; with two objectives one for each trial of the front too."""
    run = search.runs.parent
    run.log_text(best_yaml(search, best), "best.yaml")
    run.set_tags({"retinaflow.best_trial": str(best.number)})
    if not search.metrics.is_single:
        for trial in search.study.best_trials:
            run.log_text(best_yaml(search, trial), f"trial-{trial.number:04d}.yaml")


def best_yaml(search: Search, trial: FrozenTrial) -> str:
    """All training settings of a trial: those that the search found, then the others."""
    reached = ", ".join(f"{name} {value:.4f}" for name, value in zip(search.metrics.names, trial.values, strict=True))
    settings = as_yaml_values(search.space.with_values(trial.params))
    found = {name: settings[name] for name in trial.params}
    rest = {name: value for name, value in settings.items() if name not in found}
    return (
        f"# Trial {trial.number} of study {search.config.study}: {reached}.\n"
        f"# mlflow run . -e train -P config=best.yaml\n\n# Found by the search:\n{_yaml(found)}"
        f"\n# The other settings of the trial:\n{_yaml(rest)}"
    )


def as_yaml_values(settings: TrainConfig) -> dict[str, Any]:
    """Settings as the values of a YAML file that ``config=`` reads."""
    values = settings.model_dump(mode="json")
    return {
        # An empty list stays one: image_labels=none means no files, an empty list that they are looked up.
        name: as_text(value) if value is None or (isinstance(value, list) and value) else value
        for name, value in values.items()
        if name not in _NOT_IN_BEST
    }


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _file(kind: str, column: str) -> str:
    return f"{kind}{column.removeprefix('objective')}.png"
