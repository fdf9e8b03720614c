"""``search``: settings that are better for rare classes than the defaults, found with Optuna.

In reading order: ``space`` (what a trial may set), ``goal`` (what is maximised), ``storage`` (one database for all
workers), ``study`` (which trials count), ``runs`` (parent and nested runs), ``objective`` (a trial), ``opening`` (all
of these from settings), ``workers`` (who runs trials), ``confirmation`` (is the best better?), ``results`` (tables and
pictures), ``dry_run``.
"""

from __future__ import annotations

import optuna
import pandas as pd

from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs import tracking
from retinaflow.search import confirmation, results
from retinaflow.search.dry_run import estimate
from retinaflow.search.opening import Search, open_search
from retinaflow.search.storage import without_password
from retinaflow.search.study import are_alike, best_trial, states_of
from retinaflow.search.workers import Narrator, stage_of, work, work_in_processes
from retinaflow.settings.commands import SearchConfig

__all__ = ["Search", "open_search", "run"]


def run(config: SearchConfig) -> None:
    """Run the trials that are left, show what they found, and compare the best with the defaults on fresh seeds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop:
        if config.dry_run:
            estimate(config, stop)
            return
        with open_search(config, stop=stop) as search:
            _report_start(search)
            try:
                _run_stage(search, "trials")
            finally:
                with search.storage.claiming(config.study):
                    results.log_results(search)
            _report_best(search)
            if config.confirm_seeds and confirmation.arms(search):
                report(f"\nthe best trial and the defaults once more, on {config.confirm_seeds} fresh seeds")
                _run_stage(search, "confirmation")
                with search.storage.claiming(config.study):
                    _log_comparison(search, confirmation.compare(search))


def _run_stage(search: Search, name: str) -> None:
    stage = stage_of(name, search)
    narrator = Narrator(search, stage)
    if search.config.search_workers == 1:
        work(search, stage, narrator.look)
    else:
        work_in_processes(search, name, narrator.look)


def _report_start(search: Search) -> None:
    config = search.config
    ranges = "\n".join(f"  {name:<16} {text}" for name, text in search.space.document().items())
    report(
        f"study {config.study} in {without_password(search.storage.url)}: {config.trials} trials asked for; there are "
        f"{states_of(search.study.get_trials(deepcopy=False))}\n{ranges}"
    )


def _report_best(search: Search) -> None:
    best = best_trial(search.study, search.goal)
    if best is None:
        report("no complete trial keeps the floor" if search.goal.floor is not None else "no trial is complete")
        return
    reached = ", ".join(f"{name} {value:.4f}" for name, value in zip(search.goal.names, best.values, strict=True))
    report(f"\nbest trial {best.number}: {reached}; its settings are best.yaml at run {search.runs.parent.run_id}")
    if are_alike(search.study):
        report(
            f"all complete trials have the same {', '.join(search.goal.names)}, which cannot tell them apart: let them "
            "learn more (epochs, image_size), or choose another objective"
        )
    elif not confirmation.arms(search):
        report("these are the defaults: no trial was better")


def _log_comparison(search: Search, table: pd.DataFrame) -> None:
    run, said = search.runs.parent, confirmation.verdict(table, search)
    run.log_csv(table, "confirmation.csv")
    run.set_tags({"retinaflow.verdict": said})
    report(f"{table.to_string(index=False, float_format=lambda value: f'{value:.4f}')}\n{said}")
