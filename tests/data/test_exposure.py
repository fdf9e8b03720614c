"""What a strategy shows the detector, in figures worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_index import make_index, random_index

from retinaflow.data.exposure import compare_strategies, exposure_summary, exposure_table, measure_exposure
from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.sampling import STRATEGIES
from retinaflow.errors import SettingError
from retinaflow.settings.data_settings import SamplingSettings

# Class 0 on images 0, 1 and 2, class 1 on image 2, class 2 nowhere; image 3 is empty.
FOUR = image_class_pairs(make_index([[0], [0], [0, 1], []], classes=3))


def test_the_three_figures_by_hand() -> None:
    exposure = measure_exposure(np.array([1.0, 1.0, 2.0, 0.0]), FOUR, seed=0)
    assert exposure.expected_per_class.tolist() == [4, 2, 0]
    assert exposure.planned_per_class.tolist() == [4, 2, 0], "whole expected counts are drawn exactly"
    # Percentiles of (2, 4), the class without images left out: 2 + 0.95 x 2 = 3.9 over 2 + 0.05 x 2 = 2.1.
    assert exposure.imbalance == pytest.approx(3.9 / 2.1)
    assert exposure.coverage == 3 / 4
    # (1 + 1 + 2)^2 / (4 x (1 + 1 + 4)) = 16 / 24.
    assert exposure.effective_sample_size == pytest.approx(2 / 3)


def test_uniform_draws_have_full_coverage_and_effective_size() -> None:
    exposure = measure_exposure(np.ones(4), FOUR, seed=0)
    assert exposure.coverage == 1
    assert exposure.effective_sample_size == 1
    assert exposure.planned_per_class.tolist() == FOUR.images_per_class.tolist()


def test_one_image_drawn_alone_has_the_effective_size_of_one_image() -> None:
    exposure = measure_exposure(np.array([4.0, 0.0, 0.0, 0.0]), FOUR, seed=0)
    assert exposure.effective_sample_size == 1 / 4
    assert exposure.coverage == 1 / 4


def test_a_class_that_is_never_drawn_makes_the_imbalance_infinite() -> None:
    pairs = image_class_pairs(make_index([[0], [1]], classes=2))
    assert measure_exposure(np.array([2.0, 0.0]), pairs, seed=0).imbalance < float("inf"), "5th percentile of (0, 2)"
    pairs = image_class_pairs(make_index([[0]] + [[number] for number in range(1, 40)], classes=40))
    expected = np.zeros(40)
    expected[0] = 40
    assert measure_exposure(expected, pairs, seed=0).imbalance == float("inf")


def test_the_table_has_one_row_per_class_rarest_first_and_three_columns_per_strategy() -> None:
    index = make_index([[0], [0], [0, 1, 1], []], classes=3)
    pairs = image_class_pairs(index)
    bins = make_bins(pairs, num_bins=2)
    exposures = {"uniform": measure_exposure(np.ones(4), pairs, seed=0)}
    table = exposure_table(exposures, pairs, bins, index.taxonomy)  # type: ignore[arg-type]
    assert table["class"].tolist() == ["c2", "c1", "c0"]
    assert table["class_id"].tolist() == ["/m/2", "/m/1", "/m/0"]
    assert table["train_images"].tolist() == [0, 1, 3]
    assert table["train_boxes"].tolist() == [0, 2, 3]
    assert table["bin"].tolist()[1:] == [1, 2]
    assert pd.isna(table["bin"][0]), "a class without images has no bin"
    assert table["uniform_expected"].tolist() == [0, 1, 3]
    assert table["uniform_planned"].tolist() == [0, 1, 3]
    assert table["uniform_repeats"].tolist() == [0, 1, 1]


def test_all_strategies_are_compared_on_one_epoch_length() -> None:
    index = random_index(1, images=80)
    pairs = image_class_pairs(index)
    bins = make_bins(pairs)
    exposures = compare_strategies(pairs, bins, length=50, settings=SamplingSettings(), seed=0)
    assert tuple(exposures) == STRATEGIES
    summary = exposure_summary(exposures)
    assert list(summary.columns) == ["sampling", "imbalance", "coverage", "ess"]
    assert summary["sampling"].tolist() == list(STRATEGIES)
    assert (summary["ess"] <= 1 + 1e-12).all()
    assert summary["ess"][0] == pytest.approx(1), "uniform"
    assert (summary["coverage"] <= 50 / 80).all()
    assert len(exposure_table(exposures, pairs, bins, index.taxonomy)) == index.num_classes
    # Planned draws are within one of the expected ones per image, so they agree per class up to its images.
    for exposure in exposures.values():
        assert (np.abs(exposure.planned_per_class - exposure.expected_per_class) <= pairs.images_per_class).all()


def test_a_strategy_that_cannot_fill_the_epoch_is_left_out_with_a_line_unless_it_is_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 2 of 300 images have a box: at most 100 samples of each.
    pairs = image_class_pairs(make_index([[0], [0], *[[]] * 298], classes=1))
    bins = make_bins(pairs, num_bins=1)
    for chosen in ("uniform", "binned"):
        settings = SamplingSettings(sampling=chosen)  # type: ignore[arg-type]
        exposures = compare_strategies(pairs, bins, length=300, settings=settings, seed=0)
        assert tuple(exposures) == tuple(name for name in STRATEGIES if name != "class-aware")
        out = capsys.readouterr().out
        assert (
            "exposure without class-aware, which this data does not allow: epoch_length <= max_repeats x images" in out
        )
    with pytest.raises(SettingError, match="epoch_length=300, max_repeats=100, images=2"):
        compare_strategies(pairs, bins, length=300, settings=SamplingSettings(sampling="class-aware"), seed=0)
    # Every strategy may fail, also the uniform one: 300 images cannot be sampled 3,000 times with max_repeats=5.
    settings = SamplingSettings(sampling="uniform", max_repeats=5)
    with pytest.raises(SettingError, match="epoch_length=3000, max_repeats=5, images=300"):
        compare_strategies(pairs, bins, length=3000, settings=settings, seed=0)
