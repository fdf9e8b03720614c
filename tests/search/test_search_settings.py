"""What a search may set and what it maximises: written forms, rules, conditions, errors."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from sqlalchemy.engine import URL, make_url

from retinaflow.errors import SettingError
from retinaflow.interrupts import StopRequest
from retinaflow.metric.chosen_metric import ChosenMetric
from retinaflow.search.objective import ObjectiveMetrics, keep_best_of, mean_metrics, read_objective
from retinaflow.search.results import as_yaml_values
from retinaflow.search.sampler_and_pruner import pruner_of
from retinaflow.search.space import SEARCHABLE, Choices, Range, Space, read_space
from retinaflow.search.storage import open_storage, storage_url
from retinaflow.search.study import differences
from retinaflow.settings.commands import SearchConfig, TrainConfig, searchable
from retinaflow.settings.resolve import resolve
from retinaflow.settings.value_types import metric_weights
from retinaflow.taxonomy import Taxonomy


def settings(**given: Any) -> SearchConfig:
    return resolve(SearchConfig, given)


def space(**given: Any) -> Space:
    return read_space(settings(**given))


def sampled(found: Space, number: int = 60) -> list[dict[str, Any]]:
    """Parameters of random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    parameters = []
    for _ in range(number):
        trial = study.ask()
        found.settings(trial)
        parameters.append(trial.params)
    return parameters


@pytest.fixture(autouse=True)
def _silent() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


# The space


def test_the_space_holds_what_decides_the_tail_and_nothing_that_was_not_asked_for() -> None:
    assert set(space().domains) == set(SEARCHABLE) - {
        "lr",
        "backbone_lr_factor",
        "class_prior",
        "empty_image_rate",
        "nms",
        "nms_iou",
    }
    assert "lr" in space(lr="3e-4..3e-3:log").domains


@pytest.mark.parametrize(
    ("given", "domain"),
    [
        ({"focal_gamma": "1..3"}, Range(1.0, 3.0, False)),
        ({"lr": "1e-4..1e-2:log"}, Range(1e-4, 1e-2, True)),
        ({"num_bins": "3..9"}, Range(3, 9, False)),
        ({"num_bins": "3, 7,14"}, Choices((3, 7, 14))),
        ({"bin_strategy": ["log", "jenks"]}, Choices(("log", "jenks"))),
        ({"focal_alpha": "none,0.25"}, Choices((None, 0.25))),
    ],
    ids=str,
)
def test_ranges_and_choices_are_written_as_text(given: dict[str, Any], domain: Range | Choices) -> None:
    (name,) = given
    assert space(**given).domains[name] == domain


def test_a_single_value_takes_a_setting_out_and_is_what_every_trial_has() -> None:
    found = space(focal_gamma="1.5", augment=0.3)
    assert not {"focal_gamma", "augment"} & set(found.domains)
    assert (found.base.focal_gamma, found.base.augment) == (1.5, 0.3)


def test_a_file_of_settings_can_hold_ranges_and_a_flag_overrides_it(tmp_path: Any) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("focal_gamma: 1..3\nnum_bins: [4, 8]\nsampling: binned\n", encoding="utf-8")
    found = space(config=str(path), focal_gamma="2.5")
    assert found.domains["num_bins"] == Choices((4, 8))
    assert "focal_gamma" not in found.domains
    assert found.base.sampling == "binned"


def test_settings_without_effect_are_not_asked_for() -> None:
    found = space()
    for parameters in sampled(found):
        values = {**found.base.model_dump(), **parameters}
        for name in found.domains:
            when = searchable()[name].when
            assert (name in parameters) == all(values[other] in wanted for other, wanted in when.items()), parameters


def test_settings_that_can_never_have_an_effect_are_not_in_the_space() -> None:
    assert not {"num_bins", "balance", "repeat_threshold"} & set(space(sampling="uniform").domains)
    # It also sets the epoch from which rare classes are augmented more.
    assert "balance_start" in space(sampling="uniform").domains
    assert not {"num_bins", "bin_strategy"} & set(space(bin_edges="10,100").domains)


def test_every_trial_keeps_to_its_ranges_and_whole_numbers_stay_whole() -> None:
    found = space(lr="3e-4..3e-3:log")
    for parameters in sampled(found):
        assert all(value in found.domains[name] for name, value in parameters.items())
        assert isinstance(parameters.get("num_bins", 2), int)


def test_the_first_trial_tries_the_defaults() -> None:
    first = space().defaults()
    base = resolve(TrainConfig, {})
    assert (first["focal_gamma"], first["num_bins"], first["sampling"]) == (base.focal_gamma, 7, "binned")
    assert "repeat_threshold" not in first
    assert "focal_gamma" not in space(focal_gamma="3..4").defaults()


def test_the_first_trials_try_every_strategy_with_the_defaults() -> None:
    starts = space().starts()
    assert [start["sampling"] for start in starts] == ["binned", "uniform", "repeat-factor", "class-aware"]
    for start in starts:
        assert start["focal_gamma"] == resolve(TrainConfig, {}).focal_gamma
        assert ("num_bins" in start) == (start["sampling"] == "binned")
    # The default threshold of repeat-factor lies below the range, so that the sampler chooses one.
    assert "repeat_threshold" not in starts[2]
    assert len(space(sampling="binned").starts()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"focal_gamma": "3..1"}, "low < high must hold, but got focal_gamma=3..1"),
        ({"focal_gamma": "-1..1"}, "focal_gamma >= 0 must hold, but got focal_gamma=-1"),
        ({"balance_start": "0..1"}, "balance_start < 1 must hold, but got balance_start=1"),
        ({"num_bins": "2.5..4"}, "num_bins must be a whole number, but got num_bins=2.5"),
        ({"augment": "0..1:log"}, "low > 0 must hold for a logarithmic range, but got augment=0..1:log"),
        ({"augment": "0.1..1:square"}, "written low..high or low..high:log, but got augment=0.1..1:square"),
        ({"bin_strategy": "log..jenks"}, "a range must have numbers as ends, but got bin_strategy=log..jenks"),
        ({"sampling": "binned,fair"}, "sampling must be"),
        ({"focal_gamma": "low..high"}, "focal_gamma must be a number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_invalid_range_is_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        space(**given)


# The objective

METRICS = {"val/mAP": 0.4, "val/mAP_rare": 0.1, "val/mAP_frequent": 0.6, "val/mAP_bin_1": 0.1, "val/mAP_bin_3": 0.7}


KNOWN = {**METRICS, "val/coco_AP": 0.2, "val/AP/Car": 0.3}
TAXONOMY = Taxonomy(("/m/a", "/m/b"), ("Car", "Bus"))


def objective_of(**given: Any) -> ObjectiveMetrics:
    return read_objective(settings(**given), num_bins=3, known=KNOWN, taxonomy=TAXONOMY)


def test_the_weighted_mean_is_over_the_bins_with_ground_truth() -> None:
    objective = objective_of(objective="bins", bin_weights="3,2,1")
    # Bin 2 has no ground truth: (3 * 0.1 + 1 * 0.7) / 4.
    assert objective.values(METRICS) == pytest.approx((0.25,))


def test_two_objectives_give_two_values() -> None:
    objective = objective_of(objective="val/mAP,val/mAP_rare")
    assert objective.values(METRICS) == (0.4, 0.1)
    assert not objective.is_single


@pytest.mark.parametrize(("floor", "met"), [(0.6, True), (0.61, False)])
def test_a_floor_is_met_by_its_exact_value(floor: float, met: bool) -> None:
    shortfall = objective_of(floor=floor).shortfall(METRICS)
    assert shortfall is not None
    assert (shortfall <= 0) == met


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "mAP"}, "objective must name metrics of these images, but got mAP"),
        ({"objective": "val/mAP_bin_4"}, "but got val/mAP_bin_4"),
        ({"objective": "val/mAP_common"}, "but got val/mAP_common; did you mean"),
        ({"objective": "val/AP/Bus"}, "but got val/AP/Bus, and no evaluated image has a box of Bus; there are val/mAP"),
        ({"objective": "val/AP/Car,val/AP//m/a"}, "two objectives must differ"),
        ({"objective": "val/mAP,val/mAP"}, "two objectives must differ"),
        ({"objective": "bins"}, "objective=bins and bin_weights belong together"),
        ({"bin_weights": "1,2"}, "objective=bins and bin_weights belong together"),
        ({"objective": "bins", "bin_weights": "1,2,3,4"}, "at most 3 weights"),
        ({"objective": "bins", "bin_weights": "0,0"}, "not all 0"),
        ({"floor": 0.5, "floor_metric": "bins"}, "floor_metric must name metrics"),
        ({"floor": 0.5, "floor_metric": "val/AP/Car"}, "floor_metric must be that of a group of classes"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_objective_that_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        objective_of(**given)


@pytest.mark.parametrize(
    ("given", "keep_best"),
    [
        ({}, ("val/mAP_rare",)),
        ({"objective": "val/AP//m/a"}, ("val/AP//m/a",)),
        ({"objective": "val/mAP,val/coco_AP"}, ("val/mAP:1.0", "val/coco_AP:1.0")),
        # Bin 2 has no ground truth.
        ({"objective": "bins", "bin_weights": "3,2,1"}, ("val/mAP_bin_1:0.75", "val/mAP_bin_3:0.25")),
        ({"objective": "bins", "bin_weights": "1,0,0"}, ("val/mAP_bin_1",)),
        ({"keep_best": "val/mAP_rare"}, ("val/mAP_rare",)),
    ],
)
def test_trainings_keep_the_epoch_that_is_best_by_the_objective(
    given: dict[str, Any], keep_best: tuple[str, ...]
) -> None:
    found = keep_best_of(settings(**given), KNOWN)
    assert found == keep_best
    if len(objective_of(**given).names) == 1:
        metric = ChosenMetric.read("keep_best", metric_weights(found), KNOWN, TAXONOMY)
        assert metric.value(KNOWN) == pytest.approx(objective_of(**given).values(KNOWN)[0])


def test_another_keep_best_than_the_objective_is_refused() -> None:
    with pytest.raises(SettingError, match=r"best by its objective \(val/mAP_rare\), but got keep_best=val/mAP"):
        keep_best_of(settings(keep_best="val/mAP"), KNOWN)


def test_the_mean_over_seeds_leaves_out_what_one_of_them_lacks() -> None:
    assert mean_metrics([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0}


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"epochs": 4}, optuna.pruners.MedianPruner),
        ({"epochs": 9, "pruner": "hyperband"}, optuna.pruners.HyperbandPruner),
        ({"epochs": 4, "pruner": "none"}, optuna.pruners.NopPruner),
        ({"epochs": 4, "objective": "val/mAP,val/mAP_rare"}, optuna.pruners.NopPruner),
        ({"epochs": 4, "eval_every": 4, "pruner": "hyperband"}, optuna.pruners.NopPruner),
    ],
    ids=str,
)
def test_pruners_by_name(given: dict[str, Any], kind: type) -> None:
    config = settings(**given)
    assert type(pruner_of(config)) is kind


def test_two_objectives_cannot_be_pruned() -> None:
    config = settings(objective="val/mAP,val/mAP_rare", pruner="median")
    with pytest.raises(ValueError, match="pruner must be none with two objectives, but got pruner=median"):
        pruner_of(config)


# Storage and identity


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("postgresql://ada@host/db", "postgresql+psycopg://ada@host/db"),
        ("postgresql+psycopg://ada@host/db", "postgresql+psycopg://ada@host/db"),
    ],
)
def test_postgresql_is_spoken_to_through_psycopg(storage: str, expected: str, tmp_path: Any) -> None:
    assert storage_url(storage, beside="", output=tmp_path) == expected


def test_the_default_lies_beside_the_mlflow_store(tmp_path: Any) -> None:
    expected = f"sqlite:///{tmp_path / 'optuna.db'}"
    assert storage_url("auto", beside=f"sqlite:///{tmp_path / 'mlflow.db'}", output=tmp_path / "out") == expected
    assert storage_url("auto", beside="http://tracking:5000", output=tmp_path) == expected


@pytest.mark.parametrize("name", ["a%20b/o.db", "what?.db", "a b/ö#1.db", "{x}.db", "%2e%2e.db"])
@pytest.mark.parametrize("written", ["{}", "sqlite:///{}"])
def test_a_file_is_that_of_its_name(name: str, written: str, tmp_path: Path) -> None:
    path = tmp_path / name
    # In a URL these letters are quoted, in a path they are not.
    given = str(path) if written == "{}" else URL.create("sqlite", database=str(path)).render_as_string()
    with closing(open_storage(storage_url(given, beside="", output=tmp_path), stop=StopRequest())):
        assert [item for item in tmp_path.rglob("*") if item.is_file()] == [path]


def test_the_default_lies_beside_an_mlflow_store_whose_path_is_quoted(tmp_path: Path) -> None:
    beside = URL.create("sqlite", database=str(tmp_path / "50%25 a?b" / "mlflow.db")).render_as_string()
    found = make_url(storage_url("auto", beside=beside, output=tmp_path)).database
    assert found == str(tmp_path / "50%25 a?b" / "optuna.db")


@pytest.mark.parametrize("study", ["../../x", "/tmp", "a/b", "..", "a\\b", "a\nb", "x" * 201])
def test_a_study_is_a_folder_inside_of_the_output(study: str) -> None:
    with pytest.raises(ValueError, match="study: the name of a folder has 1 to 200 bytes and no / or"):
        settings(study=study)
    assert settings(study="my study.2").study == "my study.2"


@pytest.mark.parametrize("storage", ["mysql://ada:secret@host/db", "redis://host", "sqlite://"])
def test_other_databases_are_refused(storage: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="storage must be a file, sqlite:/// or postgresql://, but got") as caught:
        storage_url(storage, beside="", output=tmp_path)
    assert "secret" not in str(caught.value)


def test_differences_name_each_entry_with_both_values() -> None:
    old = {"space": {"focal_gamma": "0.5..4", "lr": "1e-4..1e-2"}, "data digest": "a"}
    new = {"space": {"focal_gamma": "1..4"}, "data digest": "a"}
    assert list(differences(old, new)) == [
        "  space: focal_gamma: the study has 0.5..4, now 1..4",
        "  space: lr: the study has 1e-4..1e-2, now not in it",
    ]


def test_settings_written_to_best_yaml_are_read_back_as_they_were(tmp_path: Path) -> None:
    settings = resolve(TrainConfig, {"data": "mydata", "focal_gamma": "1,2", "bin_edges": "10,100"})
    values = as_yaml_values(settings)
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    again = resolve(TrainConfig, {"config": str(tmp_path / "best.yaml")})
    assert {name: getattr(again, name) for name in values} == {name: getattr(settings, name) for name in values}
    assert again.image_labels == ()
