"""Calibration of scores against values worked by hand, and its promises: rising, chosen by likelihood, cross-fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_runs import detected, world

from retinaflow.detections import Detections
from retinaflow.errors import DataError
from retinaflow.metric.challenge import challenge_scores
from retinaflow.metric.matches import Kind, Matches
from retinaflow.statistics.calibration import (
    METHODS,
    Calibrator,
    ScoredDetections,
    apply_calibrators,
    choose_method,
    fit,
    held_out_loss,
    log_loss,
)
from retinaflow.statistics.cross_fitting import cross_fitted, sample_folds, scored_of_class

FOLDS = 4


def _evaluated(score: list[float], is_true: list[int]) -> ScoredDetections:
    return ScoredDetections(np.array(score), np.array(is_true, dtype=bool), np.arange(len(score)) % FOLDS)


def _drawn(share_of: str, count: int) -> ScoredDetections:
    """Scores spread evenly, true positives with a probability that depends on the score."""
    rng = np.random.default_rng(3)
    score = np.sort(rng.uniform(0.02, 0.98, count))
    logit = np.log(score / (1 - score))
    chance = {
        "as said": score,
        "over-confident": 1 / (1 + np.exp(-(0.4 * logit - 1.5))),
        "a step": np.where(score < 0.5, 0.02, 0.6),
    }[share_of]
    return ScoredDetections(score, rng.random(count) < chance, rng.integers(FOLDS, size=count))


# One class


def test_platt_by_hand() -> None:
    """Ten detections of score 0.2, one true positive, and ten of 0.8, nine true. Targets: true (10 + 1) / (10 + 2) =
    11/12, wrong 1/12. Two parameters fit two scores exactly, each gets its mean target: (9 * 11 + 1) / 120 = 5/6 and
    1/6."""
    found = fit(_evaluated([0.2] * 10 + [0.8] * 10, [1] + [0] * 9 + [0] + [1] * 9), "platt")
    np.testing.assert_allclose(found(np.array([0.2, 0.8])), [1 / 6, 5 / 6], atol=2e-6)
    # sigmoid(a * logit(0.8)) = 5/6: a * log(4) = log(5), and b = 0.
    np.testing.assert_allclose(found.points, [np.log(5) / np.log(4), 0], atol=1e-5)


def test_isotonic_by_hand() -> None:
    """Right are the second and fourth of 0.1, 0.2, 0.3, 0.4: the middle two are pooled to 1/2 at 0.25, and 0 and 1 are
    held 1 / (4 + 2) away from the ends. Half way from 0.1 to 0.25 is half way from 1/6 to 1/2."""
    found = fit(_evaluated([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1]), "isotonic")
    assert found.points == pytest.approx((0.1, 0.25, 0.4, 1 / 6, 1 / 2, 5 / 6))
    np.testing.assert_allclose(
        found(np.array([0.0, 0.1, 0.175, 0.25, 0.4, 0.9])), [1 / 6, 1 / 6, 1 / 3, 1 / 2, 5 / 6, 5 / 6], atol=1e-6
    )


def test_log_loss_by_hand() -> None:
    np.testing.assert_allclose(log_loss(np.array([0.8, 0.8]), np.array([True, False])), [-np.log(0.8), -np.log(0.2)])


@pytest.mark.parametrize(
    ("share_of", "method"), [("as said", "none"), ("over-confident", "platt"), ("a step", "isotonic")]
)
def test_the_method_of_least_held_out_loss_is_chosen(share_of: str, method: str) -> None:
    evaluated = _drawn(share_of, 1500)
    losses = {name: held_out_loss(evaluated, name) for name in METHODS}
    assert choose_method(evaluated) == method == min(losses, key=lambda name: losses[name])


def test_a_method_that_only_fits_what_it_saw_is_not_chosen() -> None:
    """Uninformative scores, a third of them true: isotonic fits them best, and predicts worse than Platt."""
    rng = np.random.default_rng(4)
    evaluated = ScoredDetections(
        np.sort(rng.uniform(0.02, 0.98, 60)), rng.random(60) < 0.3, rng.integers(FOLDS, size=60)
    )
    in_sample = {name: log_loss(fit(evaluated, name)(evaluated.score), evaluated.is_true).sum() for name in METHODS}
    assert min(in_sample, key=lambda name: in_sample[name]) == "isotonic"
    assert choose_method(evaluated) == "platt"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share_of", ["as said", "a step", "over-confident"])
def test_a_calibrator_rises_strictly_and_stays_a_share(share_of: str, method: str) -> None:
    found = fit(_drawn(share_of, 300), method)
    calibrated = found(np.linspace(0, 1, 2001).astype(np.float32))
    assert (np.diff(calibrated) > 0).all()
    assert calibrated.min() >= 0
    assert calibrated.max() <= 1


def test_scores_that_rank_the_wrong_way_keep_their_order() -> None:
    upside_down = _drawn("as said", 300)
    found = fit(replace(upside_down, is_true=~upside_down.is_true), "platt")
    assert (np.diff(found(upside_down.score)) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrator_comes_back_from_its_document(method: str) -> None:
    found = fit(_drawn("a step", 200), method)
    assert Calibrator.from_document(found.to_document()) == found
    with pytest.raises(ValueError, match="a calibrator must have a method of none, platt, isotonic"):
        Calibrator.from_document({"method": "magic", "points": []})


def test_nothing_evaluated_and_only_right_detections_can_be_fitted() -> None:
    assert fit(_evaluated([], []), "platt") == Calibrator()
    assert choose_method(_evaluated([], [])) == "none"
    for method in METHODS:
        assert np.isfinite(fit(_evaluated([0.3, 0.6, 0.9], [1, 1, 1]), method)(np.array([0.0, 0.5, 1.0]))).all()


# A whole model


@pytest.fixture(scope="module")
def model() -> tuple[Detections, Matches]:
    made = world(4, 120)
    found = detected(made, 0.5, seed=1)
    return found, challenge_scores(found, made.annotations).matches


def test_no_image_has_a_part_in_its_own_calibrators(model: tuple[Detections, Matches]) -> None:
    """Exchanging true and false positives on the images of a fold moves the scores of all folds but that one."""
    found, matches = model
    folds = sample_folds(120, FOLDS, seed=0)
    before = cross_fitted(found, matches, folds, method="platt", min_ground_truth=1)[0].score
    touched = folds[matches.image_index] == 2
    after = cross_fitted(
        found, replace(matches, kind=np.where(touched, 1 - matches.kind, matches.kind)), folds, method="platt",
        min_ground_truth=1,
    )[0].score  # fmt: skip
    own = folds[found.image_index] == 2
    np.testing.assert_array_equal(before[own], after[own])
    assert (before[~own] != after[~own]).mean() > 0.99


def test_one_method_is_chosen_for_all_folds_of_a_class_and_kept_on_all_images(
    model: tuple[Detections, Matches],
) -> None:
    found, matches = model
    folds = sample_folds(120, FOLDS, seed=0)
    scores, rows = cross_fitted(found, matches, folds, min_ground_truth=1)
    evaluated = scored_of_class(matches, 0, folds)
    chosen = choose_method(evaluated)
    assert rows[0].calibrator == fit(evaluated, chosen)
    for fold in range(FOLDS):
        own = (found.class_index == 0) & (folds[found.image_index] == fold)
        calibrator = fit(evaluated.take(evaluated.fold != fold), chosen)
        np.testing.assert_array_equal(scores.score[own], calibrator(found.score[own]))
    assert rows[0].loss_after < rows[0].loss_before


def test_a_class_of_too_few_truths_keeps_its_scores(model: tuple[Detections, Matches]) -> None:
    found, matches = model
    least = int(matches.num_truths[3]) + 1
    assert matches.num_truths[2] >= least
    scores, rows = cross_fitted(
        found, matches, sample_folds(120, FOLDS, seed=0), method="platt", min_ground_truth=least
    )
    assert [row.calibrator.method for row in rows] == ["platt", "platt", "platt", "none"]
    rare = found.class_index == 3
    np.testing.assert_array_equal(scores.score[rare], found.score[rare].astype(np.float64))
    assert (scores.score[~rare] != found.score[~rare]).all()


def test_a_kept_calibrator_leaves_the_ap_of_each_class_as_it_was(model: tuple[Detections, Matches]) -> None:
    found, matches = model
    made = world(4, 120)
    _, rows = cross_fitted(found, matches, sample_folds(120, FOLDS, seed=0), method="isotonic", min_ground_truth=1)
    calibrated = apply_calibrators(found, [row.calibrator for row in rows])
    np.testing.assert_array_equal(
        challenge_scores(calibrated, made.annotations).ap, challenge_scores(found, made.annotations).ap
    )


def test_what_a_group_of_box_absorbed_is_neither_right_nor_wrong(model: tuple[Detections, Matches]) -> None:
    found, matches = model
    kind = matches.kind.copy()
    first = int(np.flatnonzero(matches.class_index == 0)[0])
    kind[first] = Kind.GROUP_OF
    folds = sample_folds(120, FOLDS, seed=0)
    fewer = scored_of_class(replace(matches, kind=kind), 0, folds)
    assert len(fewer) == len(scored_of_class(matches, 0, folds)) - 1
    assert len(found)


def test_scores_beyond_one_are_refused(model: tuple[Detections, Matches]) -> None:
    found, matches = model
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\] to be calibrated, but row 0 has"):
        cross_fitted(replace(found, score=found.score + 1), matches, sample_folds(120, FOLDS, seed=0))


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"method": "platt", "points": ["a", 1]},
        {"method": "platt", "points": [10**400, 1]},
        {"method": [], "points": []},
    ],
    ids=["none", "text", "huge", "method"],
)
def test_a_damaged_calibrator_is_refused(document: Any) -> None:
    with pytest.raises(DataError, match="calibrator"):
        Calibrator.from_document(document)


def test_folds_are_even_and_drawn_by_their_seed_alone() -> None:
    folds = sample_folds(103, 5, seed=7)
    assert sorted(np.bincount(folds)) == [20, 20, 21, 21, 21]
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(folds, sample_folds(103, 5, seed=7))
    assert (folds != sample_folds(103, 5, seed=8)).any()
