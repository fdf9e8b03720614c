"""``promote``: register the best run's model under a name as champion, if it beats the present champion."""

from __future__ import annotations

from retinaflow.comparison.chosen_runs import candidates
from retinaflow.comparison.promotion import Decision, best_of, decide, has_model, promoted_run
from retinaflow.errors import SettingError
from retinaflow.progress import report
from retinaflow.runs import registry
from retinaflow.runs.logged_model import model_of_run
from retinaflow.runs.names import run_name
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import PromoteConfig


def run(config: PromoteConfig) -> Decision:
    """Find the best candidate, test it against the champion, register it or leave things as they are."""
    if not config.track:
        raise SettingError("promote needs the MLflow store, but got track=false")
    candidate = best_of(candidates(config))
    run_id = promoted_run(candidate)
    present = registry.champion(config.register_as, config.alias)
    with start_run("promote", config, default_name=run_name("promote", config)) as run:
        run.log_params(config.model_dump())
        run.log_model_input(model_of_run(run_id))
        decision = decide(config, candidate, run_id, present)
        run.set_tags({**decision.tags, "retinaflow.candidate": run_id, "mlflow.note.content": decision.reason})
        if decision.promoted:
            version = registry.promote(
                run_id,
                config.register_as,
                alias=config.alias,
                reason=decision.reason,
                tags=decision.tags,
                has_model=has_model(candidate),
            )
            run.set_tags({"retinaflow.version": version})
            report(f"models:/{config.register_as}@{config.alias} is now version {version}")
        report(decision.reason)
    return decision
