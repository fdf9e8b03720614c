"""What a search leaves at its parent run: ``trials.csv``, pictures, ``best.yaml``, and the front of two objectives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.trial import FrozenTrial, TrialState

from retinaflow.reports.search_figures import contour, history, importance, pareto, slices
from retinaflow.search.goal import Goal
from retinaflow.search.opening import Search
from retinaflow.search.space import SEARCHABLE, Range
from retinaflow.search.study import (
    METRICS,
    OVERHEAD,
    REASON,
    RETRY_OF,
    RUN_ID,
    SECONDS,
    best_trial,
    is_lost,
    keeps_floor,
    states_of,
)
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.fields import as_text
from retinaflow.settings.groups import TrackingSettings

FEWEST_FOR_IMPORTANCE = 4
"""Complete trials below which importances say nothing."""
_NOT_IN_BEST = {*TrackingSettings.model_fields, "resume", "register_as", "workers"} - {"seed"}


def trials_table(search: Search) -> pd.DataFrame:
    """One row per trial in the order of their numbers: state and reason, objectives, parameters, metrics, cost, run."""
    rows = [_row(trial, search.goal) for trial in search.study.get_trials(deepcopy=False)]
    table = pd.DataFrame(rows)
    params = [name for name in SEARCHABLE if name in table]
    # Whole numbers stay whole beside trials that have none.
    table = table.astype({name: "Int64" for name in ("num_bins", "retry_of") if name in table})
    first = ["trial", "state", "reason", *objective_columns(search.goal), "keeps_floor"]
    return table[[*first, *params, *(name for name in table if name not in {*first, *params})]]


def _row(trial: FrozenTrial, goal: Goal) -> dict[str, Any]:
    attributes = trial.user_attrs
    values = trial.values if trial.state == TrialState.COMPLETE else [math.nan] * len(goal.names)
    return {
        "trial": trial.number,
        "state": "lost" if is_lost(trial) else trial.state.name.lower(),
        "reason": attributes.get(REASON, ""),
        **dict(zip(objective_columns(goal), values, strict=True)),
        "keeps_floor": keeps_floor(trial),
        **trial.params,
        **attributes.get(METRICS, {}),
        "seconds": attributes.get(SECONDS, math.nan),
        "overhead_seconds": attributes.get(OVERHEAD, math.nan),
        "retry_of": attributes.get(RETRY_OF),
        "run_id": attributes.get(RUN_ID, ""),
    }


def objective_columns(goal: Goal) -> list[str]:
    """Column names of the objectives in ``trials.csv``."""
    return ["objective", "objective_2"][: len(goal.names)]


def log_results(search: Search) -> None:
    """Tables, pictures and ``best.yaml`` of the trials so far, at the parent run."""
    run, goal, study = search.runs.parent, search.goal, search.study
    table = trials_table(search)
    run.log_csv(table, "trials.csv")
    best = best_trial(study, goal)
    complete = table[table["state"] == "complete"]
    columns = objective_columns(goal)
    for column, name in zip(columns, goal.names, strict=True):
        run.log_figure(history(table, column, name=name), _file("history", column))
    _log_parameters(search, complete)
    if not goal.is_single and len(complete):
        front = [trial.number for trial in study.best_trials]
        run.log_csv(table[table["trial"].isin(front)], "pareto.csv")
        run.log_figure(pareto(complete, front, names=goal.names), "pareto.png")
    if best is not None:
        _log_best(search, best)
    run.set_tags({"retinaflow.trials": states_of(study.get_trials(deepcopy=False))})


def _log_parameters(search: Search, complete: pd.DataFrame) -> None:
    """Importances, and the first objective over each parameter and over the two most important numbers."""
    run, goal = search.runs.parent, search.goal
    weights = importances(search.study)
    name, column = goal.names[0], objective_columns(goal)[0]
    if weights:
        shares = pd.DataFrame({"parameter": list(weights), "importance": list(weights.values())})
        run.log_csv(shares, "importance.csv")
        run.log_figure(importance(weights, name=name), "importance.png")
    order = [*weights, *(parameter for parameter in SEARCHABLE if parameter not in weights)]
    shown = [parameter for parameter in order if parameter in complete and complete[parameter].notna().sum() > 1]
    log = [parameter for parameter, domain in search.space.domains.items() if isinstance(domain, Range) and domain.log]
    if len(complete) > 1 and shown:
        run.log_figure(slices(complete, column, shown, name=name, log=log), "slice.png")
        # Settings that only a few trials had would leave the picture empty.
        common = [parameter for parameter in shown if complete[parameter].notna().sum() > len(complete) / 2]
        numbers = [parameter for parameter in common if pd.api.types.is_numeric_dtype(complete[parameter])]
        if len(numbers) > 1:
            figure = contour(complete, column, (numbers[0], numbers[1]), name=name, log=log)
            run.log_figure(figure, "contour.png")


def importances(study: optuna.Study) -> Mapping[str, float]:
    """Share of each parameter in the spread of the first objective among good trials, largest first (PED-ANOVA)."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return {}
    varied = [
        name for name in SEARCHABLE if len({trial.params[name] for trial in complete if name in trial.params}) > 1
    ]
    if not varied or len({trial.values[0] for trial in complete}) == 1:
        return {}
    # Optuna takes low values of a target for the good ones, whatever the direction of the study, and warns of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=varied, target=lambda trial: -trial.values[0])
    return {name: float(weight) for name, weight in found.items()}


def _log_best(search: Search, best: FrozenTrial) -> None:
    """``best.yaml`` as a file of settings for ``train``; with two objectives a file for each trial of the front."""
    run = search.runs.parent
    run.log_text(best_yaml(search, best), "best.yaml")
    run.set_tags({"retinaflow.best_trial": str(best.number)})
    if not search.goal.is_single:
        for trial in search.study.best_trials:
            run.log_text(best_yaml(search, trial), f"trial-{trial.number:04d}.yaml")


def best_yaml(search: Search, trial: FrozenTrial) -> str:
    """All training settings of a trial: those the search found, then the rest as the trials had them."""
    goal = search.goal
    reached = ", ".join(f"{name} {value:.4f}" for name, value in zip(goal.names, trial.values, strict=True))
    settings = written(search.space.with_values(trial.params))
    found = {name: settings[name] for name in trial.params}
    rest = {name: value for name, value in settings.items() if name not in found}
    return (
        f"# Trial {trial.number} of study {search.config.study}: {reached}.\n"
        f"# mlflow run . -e train -P config=best.yaml\n\n# Found by the search:\n{_yaml(found)}"
        f"\n# The rest, as the trials had it:\n{_yaml(rest)}"
    )


def written(settings: TrainConfig) -> dict[str, Any]:
    """Settings in the form of a YAML file that ``config=`` reads."""
    values = settings.model_dump(mode="json")
    return {
        # An empty list stays one: image_labels=none says that there are none, an empty list that they are looked up.
        name: as_text(value) if value is None or (isinstance(value, list) and value) else value
        for name, value in values.items()
        if name not in _NOT_IN_BEST
    }


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _file(kind: str, column: str) -> str:
    return f"{kind}{column.removeprefix('objective')}.png"
