"""A whole search of the smallest trainings: what it leaves in a real MLflow store, and what can be done with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from optuna.trial import FrozenTrial, TrialState, create_trial
from workshop import SMALL as SMALLEST
from workshop import make_store

from retinaflow.commands import search
from retinaflow.errors import Interrupted, SettingError
from retinaflow.interrupts import stopping_at_once
from retinaflow.runs.store import fetch_file
from retinaflow.search.confirmation import ARM, SEED, Confirmation, compare, conclusion
from retinaflow.search.objective import ObjectiveMetrics, TrialReports
from retinaflow.search.results import importances, report_best, trials_table
from retinaflow.search.sampler_and_pruner import quiet, sampler_of
from retinaflow.search.seed_test import SCORES, SeedScores
from retinaflow.search.study import open_search
from retinaflow.search.trial import METRICS, TRAININGS, WORKER, best_trial
from retinaflow.settings.commands import SearchConfig, TrainConfig
from retinaflow.settings.resolve import resolve

pytestmark = pytest.mark.slow

SMALL = {
    **SMALLEST,
    "epochs": 1,
    # The defaults (gamma 2) lie outside the space, so that the best trial never is the defaults.
    "objective": "val/mAP",
    "focal_gamma": "2.5..4",
}


@dataclass(frozen=True)
class Searched:
    """A search that is over: its settings and its runs."""

    config: SearchConfig
    parent: Run
    children: dict[str, Run]

    def artifact(self, name: str) -> Path:
        return Path(mlflow.artifacts.download_artifacts(run_id=self.parent.info.run_id, artifact_path=name))


def _settings(workshop: Any, **more: Any) -> SearchConfig:
    given = {"data": str(workshop.data), **SMALL, "trials": 2, "confirm_seeds": 1, "study": "tiny", "heartbeat": 60}
    return resolve(SearchConfig, {**given, **more})


def _runs(study: str) -> tuple[Run, dict[str, Run]]:
    """The parent run of a study, and its children by name."""
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (parent,) = [run for run in found if run.data.tags.get("retinaflow.study") == study and "trial" not in _kind(run)]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len({run.info.run_name for run in children}) == len(children)
    return parent, {str(run.info.run_name): run for run in children}


def _kind(run: Run) -> str:
    return str(run.data.tags.get("retinaflow.command"))


@pytest.fixture
def searched(workshop: Any) -> Searched:
    """Two trials, and the best and the defaults once more on one fresh seed."""

    def make() -> Searched:
        config = _settings(workshop)
        search.run(config)
        return Searched(config, *_runs("tiny"))

    result: Searched = workshop.once("searched", make)
    return result


def test_a_search_is_a_parent_with_a_run_for_every_training(searched: Searched) -> None:
    assert searched.parent.info.status == "FINISHED"
    trials = {"trial-0000", "trial-0001"}
    confirmed = set(searched.children) - trials
    assert trials <= set(searched.children)
    assert sorted(name.split("-seed-")[1] for name in confirmed) == ["1000", "1000"]
    assert "confirm-defaults-seed-1000" in confirmed
    assert {run.info.status for run in searched.children.values()} == {"FINISHED"}


def test_a_trial_has_its_parameters_curves_table_and_state(searched: Searched) -> None:
    client, run = MlflowClient(), searched.children["trial-0001"]
    assert 2.5 <= float(run.data.params["focal_gamma"]) <= 4
    assert set(run.data.params) == set(TrainConfig.model_fields)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [3]
    assert {"val/mAP", "best/mAP", "best/mAP_rare", "search/objective"} <= set(run.data.metrics)
    assert (run.data.tags["retinaflow.state"], run.data.tags["retinaflow.trial"]) == ("complete", "1")
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"per_class_ap.csv", "per_class_ap.json", "per_class_history.csv"}, (
        "a trial must not leave its weights"
    )


def test_the_parent_has_the_best_so_far_under_the_names_of_its_children(searched: Searched) -> None:
    points = MlflowClient().get_metric_history(searched.parent.info.run_id, "best/mAP")
    values = [searched.children[f"trial-000{n}"].data.metrics["best/mAP"] for n in (0, 1)]
    assert [(point.step, point.value) for point in points] == [(1, values[0]), (2, max(values))]


def test_tables_and_pictures_lie_at_the_parent(searched: Searched) -> None:
    files = {item.path for item in MlflowClient().list_artifacts(searched.parent.info.run_id)}
    assert files >= {"trials.csv", "best.yaml", "history.png", "slice.png", "confirmation.csv", "space.json"}
    table = pd.read_csv(searched.artifact("trials.csv"))
    assert table["state"].tolist() == ["complete"] * 2
    for row in table.itertuples():
        run = searched.children[f"trial-{row.trial:04d}"]
        assert row.objective == run.data.metrics["search/objective"]
        assert row.run_id == run.info.run_id
        assert row.overhead_seconds >= 0


def test_the_best_settings_can_be_trained_from_the_run(searched: Searched) -> None:
    table = pd.read_csv(searched.artifact("trials.csv"))
    best = searched.children[f"trial-{table['trial'][table['objective'].idxmax()]:04d}"]
    config = resolve(TrainConfig, {"config": f"runs:/{searched.parent.info.run_id}/best.yaml"}, fetch=fetch_file)
    assert config.focal_gamma == float(best.data.params["focal_gamma"])
    assert config.image_size == 64
    for text in ("runs:/nothing", "runs:/nothing/best.yaml"):
        with pytest.raises(ValueError, match=r"runs:/RUN_ID/FILE|run nothing has no best\.yaml"):
            resolve(TrainConfig, {"config": text}, fetch=fetch_file)


def test_the_comparison_is_on_the_fresh_seed(searched: Searched) -> None:
    table = pd.read_csv(searched.artifact("confirmation.csv")).set_index("group")
    defaults = searched.children["confirm-defaults-seed-1000"]
    assert table.loc["mAP", "defaults"] == pytest.approx(defaults.data.metrics["best/mAP"])
    assert defaults.data.params["focal_gamma"] == "1.0"
    assert searched.parent.data.tags["retinaflow.verdict"].startswith("not shown to be better")


def test_optunas_own_tools_read_the_study(searched: Searched, workshop: Any) -> None:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{workshop.folder}/optuna.db")
    assert len(study.trials) == 2
    assert study.best_value == pd.read_csv(searched.artifact("trials.csv"))["objective"].max()


def test_the_page_of_a_trial_in_optuna_dashboard_leads_to_its_run(searched: Searched, workshop: Any) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{workshop.folder}/optuna.db")
    study = storage.get_study_id_from_name("tiny")
    notes = storage.get_study_system_attrs(study)
    for trial in storage.get_all_trials(study):
        run = searched.children[f"trial-{trial.number:04d}"].info
        assert notes[f"dashboard:{trial._trial_id}:note_ver"] == 1
        assert (
            f"/#/experiments/{run.experiment_id}/runs/{run.run_id})" in notes[f"dashboard:{trial._trial_id}:note_str:0"]
        )
    storage.engine.dispose()


@pytest.mark.parametrize(("value", "trainings"), [(0.9, 1), (0.0, 2)], ids=["worse than the best", "as good"])
def test_a_trial_that_is_worse_than_the_best_is_not_trained_with_its_last_seed(
    workshop: Any, value: float, trainings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _settings(
        workshop, study=f"seeds-{value}", seeds=2, track=False, output=workshop.folder / "seeds", confirm_seeds=0
    )
    with open_search(config) as opened:
        best = SeedScores(np.array([value, value + 0.01]), np.full((2, 200), value), num_images=6)
        opened.study.add_trial(create_trial(value=value + 0.005, system_attrs={SCORES: best.document()}))
        with quiet():
            trial = opened.study.ask()
        reached = opened.objective(trial)
        opened.study.tell(trial, reached)
        scores = SeedScores.of(opened.study.trials[1])
        assert reached == pytest.approx(scores.values.mean())
        assert (len(scores.values), trial.user_attrs[TRAININGS]) == (trainings, trainings)
        row = trials_table(opened).loc[1]
        assert row["reason"].startswith("worse than trial 0 after 1 of 2 seeds (p = " if trainings == 1 else "")
        report_best(opened)
    assert ("1 of 2 trainings were not needed" in capsys.readouterr().out) == (trainings == 1)


def test_the_same_command_again_has_nothing_left_to_do(searched: Searched) -> None:
    search.run(searched.config)
    parent, children = _runs("tiny")
    assert parent.info.run_id == searched.parent.info.run_id
    assert set(children) == set(searched.children)


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"focal_gamma": "2.5..5"}, "space: focal_gamma: the study has 2.5..4, now 2.5..5"),
        ({"epochs": 3}, "settings: epochs: the study has 1, now 3"),
        ({"seeds": 2}, "seeds: the study has 1, now 2"),
        ({"class_group": "Car,Tree"}, "data digest: the study has"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_compared_is_refused(
    searched: Searched, workshop: Any, given: dict[str, Any], difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del searched
    assert workshop.cli("search", data=workshop.data, study="tiny", **{**SMALL, **given}) == 2
    shown = capsys.readouterr().err
    assert "study tiny holds trials that cannot be compared with these" in shown
    assert difference in shown


def test_other_weights_of_the_same_name_cannot_be_compared(workshop: Any, tmp_path: Path) -> None:
    given = {"track": False, "output": str(tmp_path), "weights": str(tmp_path / "best.pt"), "study": "weights"}
    for content, refused in ((b"first", False), (b"first", False), (b"second", True)):
        (tmp_path / "best.pt").write_bytes(content)
        expected = pytest.raises(SettingError, match="digest of weights: the study has") if refused else nullcontext()
        with expected, open_search(_settings(workshop, **given)):
            pass


@pytest.mark.parametrize("how", ["deleted", "in another store"])
def test_a_search_whose_run_is_gone_is_continued_in_a_new_one(
    how: str, workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"study": how.replace(" ", "-"), "storage": str(tmp_path / "study.db"), "confirm_seeds": 0}
    config = _settings(workshop, **given, output=str(tmp_path), trials=1)
    search.run(config)
    first, _ = _runs(config.study)
    if how == "deleted":
        mlflow.delete_run(first.info.run_id)
    store = mlflow.get_tracking_uri() if how == "deleted" else make_store(tmp_path)
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(store)
        for trials in (2, 3):
            search.run(config.model_copy(update={"trials": trials}))
            shown = capsys.readouterr().out
            assert (f"the study's run {first.info.run_id} is not in" in shown) == (trials == 2)
            parent, children = _runs(config.study)
            assert parent.info.run_id != first.info.run_id
            assert parent.info.status == "FINISHED"
            assert sorted(children) == [f"trial-000{number}" for number in range(1, trials)]
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"nproc": 2}, "got nproc=2; search_workers= runs"),
        ({"register_as": "best"}, "register_as is a setting of train, not of search"),
    ],
    ids=["several processes", "a name in the registry"],
)
def test_settings_of_one_training_alone_are_refused(
    workshop: Any, given: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.cli("search", data=workshop.data, study="refused", **{**SMALL, **given}) == 2
    assert expected in capsys.readouterr().err


def test_a_dry_run_counts_and_leaves_nothing(workshop: Any, capsys: pytest.CaptureFixture[str]) -> None:
    storage = workshop.folder / "dry.db"
    given = {"data": workshop.data, "study": "dry", "storage": storage, "trials": 10, "dry_run": "true"}
    assert workshop.cli("search", **{**SMALL, **given}) == 0
    assert "a training sees 12 images and evaluates 6; together 240 and 120" in capsys.readouterr().out
    assert not storage.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_process_that_is_ended_loses_and_doubles_nothing(
    number: signal.Signals, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the system when memory runs out, or by a program that watches over it, which asks with SIGTERM."""
    study = f"team-{number.name}"
    config = _settings(
        workshop, study=study, search_workers=2, confirm_seeds=0, heartbeat=3, output=workshop.folder / "team"
    )
    killed: list[tuple[int, int]] = []

    def kill_one() -> None:
        while not killed:
            time.sleep(0.2)
            for trial in _running(f"sqlite:///{workshop.folder}/optuna.db", study):
                killed.append((trial.number, int(trial.user_attrs[WORKER].rpartition(":")[2])))
                os.kill(killed[0][1], number)
                break

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    search.run(config)
    thread.join()
    trials = optuna.load_study(study_name=study, storage=f"sqlite:///{workshop.folder}/optuna.db").trials
    assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == [killed[0][0]]
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 2
    parent, children = _runs(study)
    assert parent.info.status == "FINISHED"
    how = "killed by signal 9" if number == signal.SIGKILL else "stopped by a signal"
    assert f"was {how}; another one replaces it" in capsys.readouterr().out
    states = sorted((run.info.status, run.data.tags["retinaflow.state"]) for run in children.values())
    assert states[:2] == [("FINISHED", "complete")] * 2
    state = "lost" if number == signal.SIGKILL else "stopped"
    assert states[2:] in ([("KILLED", state)], []), "the lost trial had come to have a run, or it had not"


def _running(storage: str, study: str) -> list[FrozenTrial]:
    """Trials in progress that have a run."""
    if study not in optuna.get_all_study_names(storage):
        return []
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(states=(TrialState.RUNNING,))
    return [trial for trial in trials if "run_id" in trial.user_attrs]


# Pruning, the floor, and the verdict, without training


class AlwaysPrune(optuna.pruners.BasePruner):
    """Prunes whatever it is asked about."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        del study, trial
        return True


OBJECTIVE = ObjectiveMetrics(("val/mAP_rare",), (), 0.5, "val/mAP_frequent")


def test_a_trial_is_pruned_with_its_floor_and_its_metrics_but_not_after_its_last_evaluation() -> None:
    study = optuna.create_study(direction="maximize", pruner=AlwaysPrune())
    metrics = {"val/mAP_rare": 0.1, "val/mAP_frequent": 0.2}
    with quiet():
        early, late = study.ask(), study.ask()
    with pytest.raises(optuna.TrialPruned, match=r"val/mAP_rare 0\.1000 at evaluation 1 of 2"):
        TrialReports(early, OBJECTIVE, 2, prunes=True)(metrics)
    assert early.constraints == {"floor": pytest.approx(0.3)}
    assert early.user_attrs[METRICS] == metrics
    TrialReports(late, OBJECTIVE, 1, prunes=True)(metrics)
    assert study.trials[1].intermediate_values == {1: 0.1}


def test_the_best_trial_meets_the_floor_and_two_objectives_are_averaged() -> None:
    study = optuna.create_study(direction="maximize")
    for value, shortfall in ((0.9, 0.1), (0.5, 0.0), (0.7, -0.2)):
        trial = study.ask()
        with quiet():
            trial.set_constraint("floor", shortfall)
        study.tell(trial, value)
    found = best_trial(study)
    assert found is not None
    assert found.number == 2
    two = optuna.create_study(directions=["maximize"] * 2)
    for values in ((0.5, 0.1), (0.4, 0.3), (0.1, 0.31)):
        two.tell(two.ask(), values)
    found = best_trial(two)
    assert found is not None
    assert found.number == 1


def test_the_parameter_that_decides_good_values_is_the_most_important() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    assert importances(study) == {}
    for _ in range(40):
        trial = study.ask()
        gamma, _, sampling = (
            trial.suggest_float("focal_gamma", 0, 4),
            trial.suggest_float("augment", 0, 1),
            trial.suggest_categorical("sampling", ("uniform", "binned")),
        )
        # High values are rare and good: it is they that must be explained, not the many low ones.
        study.tell(trial, (gamma > 3) * gamma + 0.01 * (sampling == "binned"))
    found = importances(study)
    assert next(iter(found)) == "focal_gamma"
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("gains", "expected"), [((0.05, 0.03, 0.04), "better than"), ((0.1, -0.1, 0.05), "not shown to")]
)
def test_the_best_is_called_better_only_when_the_interval_says_so(
    workshop: Any, gains: tuple[float, ...], expected: str
) -> None:
    config = _settings(
        workshop, study=expected.replace(" ", "-"), track=False, confirm_seeds=3, output=workshop.folder / "expected"
    )
    with open_search(config) as opened:
        params = {**opened.space.defaults(), "focal_gamma": 3.0}
        distributions = {name: optuna.distributions.CategoricalDistribution([value]) for name, value in params.items()}
        opened.study.add_trial(create_trial(value=0.5, params=params, distributions=distributions))
        confirmation = Confirmation(opened)
        for seed, gain in zip(confirmation.seeds, gains, strict=True):
            for arm, value in zip(confirmation.settings, (0.3, 0.3 + gain), strict=True):
                attributes = {ARM: arm, SEED: seed, METRICS: {"val/mAP": value}}
                confirmation.study.add_trial(create_trial(value=value, user_attrs=attributes))
        table = compare(opened)
        assert table["difference"][0] == pytest.approx(np.mean(gains))
        assert conclusion(table, opened).startswith(expected)


@pytest.mark.parametrize(
    ("values", "expected"), [((0.0, 0.0), "cannot be ranked"), ((0.5, 0.4), "no trial was better")]
)
def test_a_search_that_found_nothing_says_so(
    workshop: Any, values: tuple[float, float], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = expected.replace(" ", "-")
    config = _settings(
        workshop, study=name, focal_gamma="1..4", track=False, confirm_seeds=0, output=workshop.folder / name
    )
    with open_search(config) as opened:
        for value, gamma in zip(values, (1.0, 3.0), strict=True):
            opened.study.enqueue_trial({**opened.space.defaults(), "focal_gamma": gamma})
            with quiet():
                trial = opened.study.ask()
            opened.space.settings(trial)
            trial.set_user_attr(METRICS, {"val/mAP": value})
            opened.study.tell(trial, value)
    search.run(config)
    assert expected in capsys.readouterr().out


def test_trainings_that_diverge_are_reported_and_the_search_continues(
    workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """More of them in a row than failures of which the search ends."""
    config = _settings(
        workshop, study="diverges", trials=5, anchor_scale=4, focal_gamma="2", lr="0.001,1e30", warmup=0, clip="1e30",
        confirm_seeds=0, track=False, output=workshop.folder / "diverges",
    )  # fmt: skip
    with open_search(config) as opened:
        for lr in (1e30, 1e30, 1e30, 1e30, 0.001):
            opened.study.enqueue_trial({**opened.space.defaults(), "lr": lr})
    search.run(config)
    shown = capsys.readouterr().out
    assert shown.count(" fail: TrainingError: the loss must be finite, but got") == 4
    assert "lower lr" in shown
    assert "in a row" not in shown
    with open_search(config) as opened:
        states = [trial.state for trial in opened.study.trials[:5]]
    assert states == [TrialState.FAIL] * 4 + [TrialState.COMPLETE]


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "cmaes", "nsgaii"])
def test_every_sampler_asks_for_values_that_follow_from_seed_and_trial(name: str) -> None:
    def drawn(trial: int) -> float:
        study = optuna.create_study(sampler=sampler_of(name, seed=1, trial=trial, trials=30), direction="maximize")
        return study.ask().suggest_float("focal_gamma", 0.5, 4)

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_search_that_is_stopped_before_its_first_trial_ends_in_order(workshop: Any, tmp_path: Path) -> None:
    config = _settings(workshop, track=False, output=str(tmp_path), study="stopped", storage=str(tmp_path / "o.db"))

    def stop_when_it_begins() -> None:
        while not (tmp_path / "stopped" / "space.json").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_it_begins)
    thread.start()
    # As under the command line; what is stopped is the reading of data, or the first trial.
    with stopping_at_once(), pytest.raises((Interrupted, KeyboardInterrupt), match="SIGINT"):
        search.run(config)
    thread.join()
    study = optuna.load_study(study_name="stopped", storage=f"sqlite:///{tmp_path}/o.db")
    assert not [trial for trial in study.get_trials() if trial.state == TrialState.RUNNING]
