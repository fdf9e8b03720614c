"""``compare`` and ``promote`` in a real store: runs found, pooled, refused; the report; the champion and its reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from simulated_runs import World, run, world

from retinaflow.commands import evaluate, promote
from retinaflow.commands.train import TrainResult
from retinaflow.comparison.chosen_runs import chosen_run
from retinaflow.comparison.images_of_run import images_of_run
from retinaflow.comparison.promotion import Decision, champion_matches, promoted_run
from retinaflow.comparison.stored_matches import read_matches, save_matches
from retinaflow.errors import DataError, SettingError
from retinaflow.metric.challenge import average_precision
from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.start import start_run
from retinaflow.runs.store import find_run
from retinaflow.settings.commands import EvaluateConfig, PromoteConfig
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.resolve import resolve

QUICK = {"bootstrap": 100}


@pytest.fixture(scope="module")
def made() -> World:
    return world(6, 60)


def _logged(
    made: World,
    name: str,
    *,
    skill: float,
    seed: int,
    command: str = "train",
    tags: dict[str, str] | None = None,
    **settings: object,
) -> str:
    """A finished run with matches, as ``train`` would leave it. Returns its id."""
    kept = run(made, skill, seed=seed, settings=settings)
    with start_run(command, TrackingSettings(experiment="compared", output=Path("out")), name=name) as logged:
        save_matches(kept, Path("matches.npz"))
        logged.log_file(Path("matches.npz"))
        logged.set_tags(tags or {})
    return logged.run_id


@pytest.fixture
def store(workshop: Any, made: World) -> Any:
    """Five runs: two settings with two seeds each, and a third one."""

    def make() -> dict[str, str]:
        return {
            "a1": _logged(made, "a1", skill=0.0, seed=1, lr=0.001, output="here"),
            "a2": _logged(made, "a2", skill=0.0, seed=2, lr=0.001, output="there"),
            "b1": _logged(made, "b1", skill=1.5, seed=1, lr=0.01),
            "b2": _logged(made, "b2", skill=1.5, seed=2, lr=0.01),
            "c1": _logged(made, "c1", skill=1.5, seed=3, lr=0.01, augment=0.0),
        }

    workshop.ids = workshop.once("compared", make)
    return workshop


def _compare(store: Any, **given: Any) -> int:
    result: int = store.cli("compare", **{**QUICK, "samples": 0, "experiment": "compared", **given})
    return result


def _last(command: str) -> Any:
    found = mlflow.search_runs(
        filter_string=f"tags.`retinaflow.command` = '{command}'",
        search_all_experiments=True,
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    return found[0]


def test_two_runs_make_a_report_and_a_run_with_links(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = store.ids
    assert _compare(store, runs=f"{ids['a1']},{ids['b1']}", output="one") == 0
    assert "B (lr=0.01) against A (lr=0.001):\n  Use B." in capsys.readouterr().out
    logged = _last("compare")
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["retinaflow.compared"] == f"{ids['a1']},{ids['b1']}"
    experiment = MlflowClient().get_run(ids["a1"]).info.experiment_id
    assert f"- A: [a1](#/experiments/{experiment}/runs/{ids['a1']})" in logged.data.tags["mlflow.note.content"]
    names = {item.path for item in MlflowClient().list_artifacts(logged.info.run_id)}
    expected = {"comparison.html", "comparison.csv", "per_class_comparison.csv", "settings.csv", "difference_B.png"}
    assert names == expected == {path.name for path in Path("one").iterdir()}
    groups = pd.read_csv("one/comparison.csv").set_index("group")
    means = [np.nanmean(average_precision(read_matches(ids[name]).matches)) for name in ("a1", "b1")]
    assert groups.at["mAP", "B_difference"] == pytest.approx(means[1] - means[0])
    assert logged.data.metrics["B/mAP_difference"] == pytest.approx(means[1] - means[0])
    assert len(pd.read_csv("one/per_class_comparison.csv")) == 6
    assert pd.read_csv("one/settings.csv").to_dict("records") == [{"setting": "lr", "A": 0.001, "B": 0.01}]


def test_runs_are_found_by_name_and_pooled_over_seeds(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(store, runs="a1+a2,b1+b2", output="pooled", track="false") == 0
    assert (
        "hold for trainings with other seeds too (2 and 2 were compared; more seeds would narrow them)"
        in capsys.readouterr().out
    )
    page = Path("pooled/comparison.html").read_text(encoding="utf-8")
    assert all(store.ids[name] in page for name in ("a1", "a2", "b1", "b2"))


def test_a_filter_pools_what_differs_in_its_seed_only(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"filter": "attributes.run_name LIKE '__'", "from_experiment": "compared"}
    assert _compare(store, **given, output="filtered", track="false") == 0
    shown = capsys.readouterr().out
    # Oldest first: A is lr=0.001 with two seeds, B lr=0.01 with two, C without augmentation.
    assert "B (lr=0.01, augment=–) against A (lr=0.001, augment=–)" in shown
    assert "(2 and 2 were compared; more" in shown
    assert "C (lr=0.01, augment=0.0) against A" in shown
    assert "C is one training and is assumed to vary over seeds as A does (2 trainings" in shown


def test_machine_and_place_of_the_data_make_no_other_setting_but_its_content_does(
    store: Any, made: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> None:
        here: dict[str, Any] = {"nproc": 1, "data": "mydata", "save_minutes": 5.0, "compile": False}
        there: dict[str, Any] = {"nproc": 2, "data": "/there/mydata", "save_minutes": 0.0, "compile": True}
        for name, seed, place, digest in (("one", 1, here, "0a"), ("two", 2, there, "0a"), ("other", 3, there, "0b")):
            tags = {"retinaflow.data_digest": f"{digest}-1"}
            _logged(made, f"place {name}", skill=0.0, seed=seed, lr=0.5, tags=tags, **place)
        # An evaluation names what its model was trained on.
        tags = {"retinaflow.data_digest": "1", "retinaflow.training_digest": "0a"}
        _logged(made, "evaluated there", skill=0.0, seed=4, command="evaluate", lr=0.5, tags=tags, **there)

    store.once("places", make)
    assert _compare(store, runs="place one+place two+evaluated there,b1", output="places", track="false") == 0
    shown = capsys.readouterr().out
    assert "B (lr=0.01) against A (lr=0.5):" in shown
    assert "as A does (3 trainings;" in shown
    assert _compare(store, runs="place one+place other,b1", track="false") == 2
    assert "but got (training data)=0a in place one, 0b in place other" in capsys.readouterr().err
    assert _compare(store, filter="attributes.run_name LIKE 'place %'", output="contents", track="false") == 0
    assert "B (data=/there/mydata) against A (data=mydata)" in capsys.readouterr().out
    rows = pd.read_csv("contents/settings.csv").set_index("setting")
    assert rows.to_dict("index") == {
        "data": {"A": "mydata", "B": "/there/mydata"},
        "(training data)": {"A": "0a", "B": "0b"},
    }


def test_folders_of_untracked_runs_are_compared_too(store: Any, made: World) -> None:
    for name, skill in (("left", 0.0), ("right", 1.0)):
        Path(name).mkdir(exist_ok=True)
        save_matches(run(made, skill, seed=1), Path(name) / "matches.npz")
    assert _compare(store, runs="left,right", output="folders", track="false") == 0
    assert "right against left" in Path("folders/comparison.html").read_text(encoding="utf-8")


WRONG = {
    "one run": ({"runs": "a1"}, "2 to 8 settings can be compared, but got 1"),
    "twice": ({"runs": "a1,b1+a1"}, "each run can be given once, but got twice: "),
    "mixed": (
        {"runs": "a1+b1,c1"},
        "runs joined by + must differ in their seed only, but got lr=0.001 in a1, 0.01 in b1",
    ),
    "nobody": ({"runs": "a1,nobody"}, "run nobody: there is no such id or name in sqlite:"),
    "both": ({"runs": "a1,b1", "filter": "metrics.x > 1"}, "runs or filter can be given, not both"),
    "no filter": ({"filter": "what?"}, "filter="),
    "nothing found": (
        {"filter": "params.lr = '7'"},
        "two finished trainings are needed, but filter=params.lr = '7' finds 0",
    ),
    "bootstrap": ({"runs": "a1,b1", "bootstrap": 5}, "bootstrap >= 100 must hold, but got bootstrap=5"),
    "other data": (
        {"runs": "a1,elsewhere"},
        "only runs evaluated on the same data can be compared, but got A: 60 images ",
    ),
    "no matches": ({"runs": "a1,bare"}, "evaluate the model again with evaluate from_run="),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_be_compared_is_named(fault: str, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = WRONG[fault]
    store.once("elsewhere", lambda: _logged(world(6, 60, seed=5), "elsewhere", skill=0.0, seed=1, command="test"))
    with start_run("test", TrackingSettings(experiment="compared", output=Path("out")), name="bare"):
        pass
    if fault == "no matches":
        bare = _last("test").info.run_id
        given = {"runs": f"a1,{bare}"}
    assert _compare(store, **given, track="false", output="wrong") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


# On a real training


@pytest.fixture
def evaluated_again(trained: TrainResult, workshop: Any) -> str:
    """Id of an ``evaluate`` run of the training with another score threshold."""

    def make() -> str:
        given = {"from_run": trained.run_id, "score_threshold": 0.3, "bootstrap": 0, "output": "again"}
        evaluate.run(resolve(EvaluateConfig, given))
        return str(_last("evaluate").info.run_id)

    result: str = workshop.once("evaluated again", make)
    return result


@pytest.mark.slow
def test_a_training_keeps_matches_that_give_its_scores(trained: TrainResult) -> None:
    kept = read_matches(trained.run_id)
    np.testing.assert_array_equal(average_precision(kept.matches), average_precision(trained.evaluation.scores.matches))
    index = images_of_run(kept)
    assert index.taxonomy.labels == kept.class_names
    np.testing.assert_array_equal(index.image_ids, kept.matches.image_ids)


def test_a_training_and_its_evaluation_are_compared_with_sample_images(
    trained: TrainResult, evaluated_again: str, workshop: Any
) -> None:
    given = {"runs": f"{evaluated_again},{trained.run_id}", "bootstrap": 100, "output": "real", "track": "false"}
    assert workshop.cli("compare", **given) == 0
    page = Path("real/comparison.html").read_text(encoding="utf-8")
    assert "score_threshold=0.02 against score_threshold=0.3" in page
    assert "What one finds and the other misses" in page
    assert "No sample images" not in page
    rows = pd.read_csv("real/settings.csv").set_index("setting")
    assert rows.loc["score_threshold", ["A", "B"]].astype(float).tolist() == [0.3, 0.02]


def test_without_the_evaluated_images_the_report_says_so(
    trained: TrainResult, evaluated_again: str, workshop: Any
) -> None:
    moved = workshop.data.rename(workshop.folder / "moved")
    try:
        given = {"runs": f"{evaluated_again},{trained.run_id}", "bootstrap": 100, "output": "moved-away"}
        assert workshop.cli("compare", **given, track="false") == 0
    finally:
        moved.rename(workshop.data)
    page = Path("moved-away/comparison.html").read_text(encoding="utf-8")
    assert "No sample images, as those evaluated cannot be read here: " in page


# The champion


@pytest.fixture
def with_model(trained: TrainResult, workshop: Any, made: World) -> Iterator[dict[str, str]]:
    """Runs with a model each: a weak one, a better one, and one that is only a little better than that."""

    def make() -> dict[str, str]:
        ids, dataset = {}, DatasetInput("made/validation", "0123456789abcdef", "made", {}, "validation")
        for name, skill, seed in (("weak", 0.0, 1), ("better", 1.5, 2), ("equal", 1.5, 3)):
            kept = run(made, skill, seed=seed)
            with start_run("train", TrackingSettings(experiment="champions", output=Path("out")), name=name) as one:
                save_matches(kept, Path("matches.npz"))
                one.log_file(Path("matches.npz"))
                one.log_file(trained.checkpoint, "checkpoints")
                one.log_model(trained.checkpoint, register_as=None, step=0, dataset=dataset)
            ids[name] = one.run_id
        return ids

    yield workshop.once("models", make)
    # Each test starts without a champion.
    client = MlflowClient()
    if client.search_registered_models("name = 'flowers'"):
        client.delete_registered_model("flowers")


def _promote(**given: Any) -> Decision:
    settings = {"register_as": "flowers", "experiment": "champions", **QUICK, **given}
    return promote.run(resolve(PromoteConfig, settings))


def _champion() -> Any:
    return MlflowClient().get_model_version_by_alias("flowers", "champion")


@pytest.mark.slow
def test_the_first_is_champion_and_a_surely_better_one_replaces_it(with_model: dict[str, str]) -> None:
    assert _promote(runs="weak").promoted
    assert _champion().run_id == with_model["weak"]
    assert _champion().tags["retinaflow.reason"] == "first"
    # The best of the candidates stands for them.
    decision = _promote(runs="weak,better")
    version = _champion()
    assert decision.promoted
    assert version.run_id == with_model["better"]
    assert version.description == decision.reason
    assert re.search(r"better \(\w{32}\) beats version 1: mAP 0\.\d{4} against 0\.\d{4}", version.description)
    assert (version.tags["retinaflow.reason"], version.tags["retinaflow.replaces"]) == ("better", "1")
    assert float(version.tags["retinaflow.difference_low"]) > 0
    logged = _last("promote")
    assert logged.data.tags["retinaflow.version"] == str(version.version)
    assert logged.info.status == "FINISHED"


def test_one_finished_training_is_enough_and_seeds_of_a_setting_are_candidates(with_model: dict[str, str]) -> None:
    assert _promote(filter="attributes.run_name = 'weak'", from_experiment="champions").promoted
    assert _champion().run_id == with_model["weak"]
    _promote(filter="attributes.run_name != 'equal'", from_experiment="champions")
    assert _champion().run_id == with_model["better"]
    with pytest.raises(ValueError, match=r"a finished training is needed, but filter=.* finds 0; name runs as runs=ID"):
        _promote(filter="attributes.run_name = 'nobody'", from_experiment="champions")


def test_one_that_is_not_surely_better_stays_outside_unless_forced(with_model: dict[str, str]) -> None:
    _promote(runs="better")
    refused = _promote(runs="equal")
    assert not refused.promoted
    assert "is not significantly better than version 1, which stays champion" in refused.reason
    assert _champion().run_id == with_model["better"]
    forced = _promote(runs="equal", force=True)
    assert forced.promoted
    assert _champion().run_id == with_model["equal"]
    assert "by force=true, without a test" in _champion().description
    assert not _promote(runs="equal").promoted


def test_a_champion_evaluated_on_other_data_is_not_tested_against(with_model: dict[str, str]) -> None:
    _promote(runs="weak")
    other = run(world(6, 60, seed=5), 3.0, seed=1)
    with start_run("evaluate", TrackingSettings(experiment="champions", output=Path("out"))) as evaluated:
        save_matches(other, Path("matches.npz"))
        evaluated.log_file(Path("matches.npz"))
        evaluated.set_tags({"retinaflow.evaluated": "models:/flowers/2", "retinaflow.model_run": with_model["better"]})
    with pytest.raises(ValueError, match="only runs evaluated on the same data can be compared"):
        _promote(runs=evaluated.run_id)
    # Once the champion is evaluated on that data too, the two can be tested.
    with start_run("evaluate", TrackingSettings(experiment="champions", output=Path("out"))) as champion:
        save_matches(run(world(6, 60, seed=5), 0.0, seed=2), Path("matches.npz"))
        champion.log_file(Path("matches.npz"))
        evaluated_champion = {"retinaflow.evaluated": "models:/flowers@champion"}
        champion.set_tags(evaluated_champion | {"retinaflow.model_run": with_model["weak"]})
    assert _promote(runs=evaluated.run_id).promoted
    assert _champion().run_id == with_model["better"]


@pytest.mark.slow
@pytest.mark.parametrize("named", ["run", "registered", "file"])
def test_an_evaluation_stands_for_the_training_however_its_model_was_named(
    named: str, trained: TrainResult, with_model: dict[str, str], workshop: Any
) -> None:
    (version,) = {int(one.version) for one in MlflowClient().search_model_versions("name = 'tiny-detector'")}
    names = {"run": trained.run_id, "registered": f"models:/tiny-detector/{version}", "file": str(trained.checkpoint)}
    given = {"from_run": names[named], "bootstrap": 0, "samples": 0, "output": f"named-{named}"}
    assert workshop.cli("evaluate", **given, experiment="champions", error_analysis="false") == 0
    promoted = promoted_run(chosen_run(_last("evaluate").info.run_id))
    # The runs of the other tests have logged the same weights.
    assert promoted in ({trained.run_id} if named != "file" else {trained.run_id, *with_model.values()})
    # On other data than the champion's own: only such an evaluation is of the same images.
    candidate = read_matches(_last("evaluate").info.run_id)
    assert champion_matches(promoted, candidate).ground_truth == candidate.ground_truth


def test_an_evaluation_of_a_file_that_no_run_has_logged_says_so(store: Any, made: World) -> None:
    del store
    with start_run("evaluate", TrackingSettings(experiment="champions", output=Path("out"))) as evaluated:
        save_matches(run(made, 1.0, seed=1), Path("matches.npz"))
        evaluated.log_file(Path("matches.npz"))
        evaluated.set_tags({"retinaflow.evaluated": "elsewhere.pt", "retinaflow.model_digest": "0" * 16})
    with pytest.raises(
        SettingError, match=r"has evaluated elsewhere\.pt, of which sqlite:.* has no training; name a run"
    ):
        _promote(runs=evaluated.run_id)


def test_without_ground_truth_nothing_is_promoted_but_by_force(store: Any, made: World) -> None:
    del store
    none = np.zeros(0, dtype=np.int64)
    for number in (1, 2):
        kept = run(made, 1.0, seed=number)
        matches = replace(kept.matches, gt_image=none, gt_class=none, gt_count=none)
        name = f"unannotated{number}"
        with start_run("evaluate", TrackingSettings(experiment="champions", output=Path("out")), name=name) as logged:
            save_matches(replace(kept, matches=matches, settings={"predictions": f"{name}.csv"}), Path("matches.npz"))
            logged.log_file(Path("matches.npz"))
    assert _promote(runs="unannotated1", register_as="unannotated").promoted
    with pytest.raises(SettingError, match="none of the 6 classes that both have has ground truth on the 60 images"):
        _promote(runs="unannotated2", register_as="unannotated")
    assert _promote(runs="unannotated2", register_as="unannotated", force=True).promoted


@pytest.mark.parametrize("name", ["Bob's flowers", 'the "best"', "a_b% \\ c"])
def test_a_model_may_have_a_quote_in_its_name(name: str, with_model: dict[str, str]) -> None:
    for _ in range(2):
        _promote(runs="weak", register_as=name, force=True)
        found = MlflowClient().get_model_version_by_alias(name, "champion")
        # A second time, the version is found again.
        assert (found.run_id, str(found.version)) == (with_model["weak"], "1")


@pytest.mark.parametrize("name", ["it's", 'a "run"', "100% a_run \\ it's"])
def test_a_run_is_found_by_its_name_whatever_quotes_it_has(name: str, store: Any) -> None:
    del store
    for own in (name, name.replace("i", "I").replace("a", "A")):
        with start_run("test", TrackingSettings(experiment="quotes", output=Path("out")), name=own) as logged:
            pass
    assert find_run(name).name == name
    assert find_run(own).run_id == logged.run_id
    with pytest.raises(SettingError, match=r"cannot be looked up: .*; give an id"):
        find_run(name + "'\"")


def test_a_run_without_a_model_and_an_untracked_promotion_are_refused(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.cli("promote", runs="a1", register_as="weeds", experiment="champions", **QUICK) == 2
    assert f"run {store.ids['a1']}: its model cannot be registered as weeds" in capsys.readouterr().err
    assert store.cli("promote", runs="a1", track="false") == 2
    assert "promote needs the MLflow store, but got track=false" in capsys.readouterr().err


def test_evaluated_files_of_predictions_are_compared_and_promoted(
    store: Any, made: World, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {
        name: _logged(made, name, skill=skill, seed=9, command="evaluate", predictions=f"{name}.json")
        for name, skill in (("theirs", 0.0), ("theirs_again", 3.0))
    }
    assert _compare(store, runs="theirs,theirs_again", output="files", track="false") == 0
    assert "B (predictions=theirs_again.json) against A (predictions=theirs.json)" in capsys.readouterr().out
    # One of them against a training, too, which has many settings that the other lacks.
    assert _compare(store, runs="a1,theirs_again", output="mixed", track="false") == 0
    assert "B (predictions=theirs_again.json) against A (a1)" in capsys.readouterr().out
    assert _promote(runs="theirs", register_as="detectors").reason.startswith("theirs (")
    decision = _promote(runs="theirs_again", register_as="detectors")
    assert decision.promoted
    assert decision.tags["retinaflow.reason"] == "better"
    champion = MlflowClient().get_model_version_by_alias("detectors", "champion")
    assert champion.run_id == ids["theirs_again"]
    assert "beats version 1" in champion.description
    assert not _promote(runs="theirs", register_as="detectors").promoted
    assert _promote(runs="theirs_again", register_as="detectors").tags["retinaflow.reason"] == "already champion"
    with pytest.raises(DataError, match="holds no checkpoint, as one that is known by its predictions only"):
        TrainedModel.find("models:/detectors@champion")


def test_the_settings_of_a_pooled_run_are_kept_as_json(store: Any) -> None:
    kept = read_matches(store.ids["a1"])
    assert json.loads(json.dumps(dict(kept.settings))) == {"seed": 1, "lr": 0.001, "output": "here"}
