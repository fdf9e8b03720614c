"""Which seeds of a trial are trained: the objective as a mean over classes, the test by hand and by simulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from simulated_runs import World, run, table_of, world

from retinaflow.metric.per_class import class_groups, summary
from retinaflow.search.objective import ObjectiveMetrics
from retinaflow.search.sampler_and_pruner import quiet
from retinaflow.search.seed_test import LEVEL, SeedScores, SeedTest, p_value

WORLD = world(6, 120)


def seed_test(made: World, parts: dict[str, float], *, seeds: int = 3, ends_trials: bool = True) -> SeedTest:
    """As :meth:`SeedTest.on` makes it."""
    counts = made.training
    groups = class_groups(counts.images, counts.bin_of_class, class_ids=made.annotations.taxonomy.ids)
    groups["mAP"] = np.ones(len(counts.images), dtype=bool)
    return SeedTest(seeds, [(groups[name.removeprefix("val/")], weight) for name, weight in parts.items()], ends_trials)


@pytest.mark.parametrize(
    ("name", "bin_weights"),
    [("val/mAP", ()), ("val/mAP_rare", ()), ("val/mAP_bin_1", ()), ("bins", (3.0, 2.0, 0.0, 1.0))],
)
def test_the_objective_is_the_mean_of_ap_with_its_weights(name: str, bin_weights: tuple[float, ...]) -> None:
    objective = ObjectiveMetrics((name,), bin_weights, None, "val/mAP")
    made = run(WORLD, 0.5, seed=1)
    table = table_of(made, WORLD)
    weights = seed_test(WORLD, objective.parts).weights(made.matches)
    ap = table.set_index("class_id")["ap"].loc[list(WORLD.annotations.taxonomy.ids)].to_numpy()
    assert weights.sum() == pytest.approx(1)
    assert np.nansum(weights * ap) == pytest.approx(objective.values(summary(table))[0])


def test_scores_are_stored_and_read_as_they_were() -> None:
    test, study = seed_test(WORLD, {"val/mAP": 1.0}), optuna.create_study(direction="maximize")
    scores = SeedScores(np.empty(0), np.empty((0, 200)))
    for seed in range(2):
        scores = test.with_training(scores, 0.4 + seed / 10, run(WORLD, 0.5, seed=seed).matches)
    scores.resampled[0, 0] = np.nan
    with quiet():
        trial = study.ask()
    trial.storage.set_trial_system_attr(trial._trial_id, "retinaflow:seeds", scores.document())
    read = SeedScores.of(study.trials[0])
    assert read.values.tolist() == [0.4, 0.5]
    np.testing.assert_allclose(read.resampled, scores.resampled, atol=1e-6)
    assert (read.num_images, read.unseen) == (scores.num_images, scores.unseen)
    # Every class has ground truth in some image; an image without counts in no class.
    assert read.num_images == 120


def scores(values: list[float], moved: Any = 0.0) -> SeedScores:
    """Trainings whose resamples differ from the value by ``moved``."""
    resampled = np.array(values)[:, None] + np.broadcast_to(moved, (len(values), 200))
    return SeedScores(np.array(values), resampled, num_images=10_000)


def test_a_p_value_by_hand() -> None:
    # Trial 0.3 after one seed, best 0.4, 0.5, 0.6; no error over images. The pooled variance is 0.02 / 2 = 0.01 (the
    # trial adds no degree of freedom), the error sqrt(0.01 (1 + 1/3)) = 0.11547, t = -0.2 / 0.11547 = -1.732 with 2
    # degrees of freedom: the tail is 1/2 - 1.732 / (2 sqrt(2 + 3)) = 0.1127.
    best, trial = scores([0.4, 0.5, 0.6]), scores([0.3])
    assert p_value(trial, best, [best.values, trial.values]) == pytest.approx(0.1127, abs=1e-4)
    assert p_value(best, best, [best.values]) == pytest.approx(0.5)
    # A better trial is not worse.
    assert p_value(scores([0.7]), best, [best.values]) == pytest.approx(1 - 0.1127, abs=1e-4)


def test_the_error_over_images_is_that_of_the_difference() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    best, others = scores([0.4, 0.5, 0.6]), [np.array([0.1, 0.1, 0.1001])] * 50
    # What both have in common cancels out; with no other difference the trial is worse for certain.
    together = p_value(scores([0.4], noise), replace(best, resampled=best.resampled + noise), others)
    apart = p_value(scores([0.4], noise), replace(best, resampled=best.resampled - noise), others)
    assert together < 1e-6
    assert 0.1 < apart < 0.3


def test_without_a_trial_of_two_seeds_nothing_is_worse() -> None:
    assert p_value(scores([0.1]), scores([0.9]), [np.array([0.9]), np.array([0.1])]) == 1.0


@pytest.mark.parametrize(
    ("skill", "ends_trials", "trained"),
    [(-3.0, True, 1), (-3.0, False, 3), (0.5, True, 3)],
    ids=["much worse", "much worse, but no trial ends early", "as good"],
)
def test_a_trial_that_is_worse_beyond_chance_ends_after_its_first_seeds(
    skill: float, ends_trials: bool, trained: int
) -> None:
    test = seed_test(WORLD, {"val/mAP": 1.0}, ends_trials=ends_trials)
    study = optuna.create_study(direction="maximize")
    reasons: list[str | None] = []
    for number, ease in enumerate((0.5, 0.5, skill)):
        with quiet():
            trial = study.ask()
        values: list[float] = []
        reasons = []
        while len(values) < 3 and not any(reasons):
            made = run(WORLD, ease, seed=10 * number + len(values))
            values.append(float(np.nanmean(table_of(made, WORLD)["ap"])))
            reasons.append(test.add(trial, values[-1], made.matches))
        study.tell(trial, float(np.mean(values)))
    assert len(reasons) == trained
    if trained == 1:
        assert str(reasons[0]).startswith("worse than trial ")
        assert "after 1 of 3 seeds (p = " in str(reasons[0])


def test_a_trial_as_good_as_the_best_rarely_ends_and_a_worse_one_mostly() -> None:
    """300 pairs of trials of three seeds, each among 10 other trials that show how much seeds matter."""
    rng, seeds, ended = np.random.default_rng(0), 3, {0.0: 0, 0.15: 0}
    for gap in ended:
        for _ in range(300):
            images = rng.normal(0, 0.02, (2, 200))
            best = scores((0.5 + rng.normal(0, 0.03, seeds)).tolist(), images[0])
            values = (0.5 - gap + rng.normal(0, 0.03, seeds)).tolist()
            others = [rng.normal(0.3, 0.03, seeds) for _ in range(10)]
            looks = (scores(values[: look + 1], images[1]) for look in range(seeds - 1))
            level = LEVEL / (seeds - 1)
            ended[gap] += any(p_value(look, best, [*others, best.values, look.values]) <= level for look in looks)
    assert ended[0.0] <= 15 + 8, "more than 5% and the error of 300 draws"
    assert ended[0.15] >= 240
