"""``search``: find settings that are better for rare classes than the defaults, with Optuna.

The files of ``retinaflow/search`` in reading order: ``space`` (what a trial may set), ``objective`` (what is maximised,
and how a trial is run), ``training`` (one training of it), ``seed_test`` (how many of them), ``sampler_and_pruner``,
``storage`` (one database for all workers), ``trial`` (its states and its run), ``runs`` (parent and nested runs),
``study`` (all of these from settings), ``stages`` (the trials, and then the confirmation), ``workers`` and
``worker_processes`` (who runs trials), ``confirmation`` (is the best better than the defaults?), ``results`` (tables
and figures), ``dry_run`` (the cost).
"""

from __future__ import annotations

from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.reports.bins_and_exposure import log_bins
from retinaflow.runs import tracking
from retinaflow.search import confirmation, results
from retinaflow.search.dry_run import estimate
from retinaflow.search.sampler_and_pruner import quiet
from retinaflow.search.study import Search, open_search
from retinaflow.search.trial import states_of
from retinaflow.search.worker_processes import run_stage
from retinaflow.settings.commands import SearchConfig

__all__ = ["Search", "open_search", "run"]


def run(config: SearchConfig) -> None:
    """Run the missing trials, log the results, and compare the best trial with the defaults on fresh seeds."""
    stop = StopRequest(watch_parent=tracking.launched_by_mlflow())
    with quiet():
        if config.dry_run:
            estimate(config, stop)
            return
        with open_search(config, stop=stop) as search:
            _report_start(search)
            log_bins(search.runs.parent, search.data)
            try:
                with stop:
                    run_stage(search, "trials")
            finally:
                results.log_results(search)
            results.report_best(search)
            if config.confirm_seeds and confirmation.arms(search):
                report(f"\ncomparing the best trial with the defaults on {config.confirm_seeds} fresh seeds")
                with stop:
                    run_stage(search, "confirmation")
                confirmation.log_comparison(search)


def _report_start(search: Search) -> None:
    config = search.config
    ranges = "\n".join(f"  {name:<16} {text}" for name, text in search.space.document().items())
    report(
        f"study {config.study} in {search.storage.address}: {config.trials} trials requested; there are "
        f"{states_of(search.study.get_trials(deepcopy=False))}\n{ranges}"
    )
