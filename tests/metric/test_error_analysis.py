"""Error analysis: each kind of error is told and priced in hand-worked scenes; on random ones it agrees with a loop."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scoring_scenes import Box, Found, Label, Scene, Truth

from retinaflow.boxes import iou
from retinaflow.metric import nearest_ground_truth
from retinaflow.metric.challenge import challenge_scores, match
from retinaflow.metric.error_analysis import ALL_CLASSES, COSTS, ErrorAnalysis, ErrorKind, analyse_errors
from retinaflow.metric.matches import Kind

HERE, FAR = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)
NEARBY = (0.2, 0.0, 0.6, 0.4)
"""IoU with HERE: 0.2 x 0.4 / (2 x 0.16 - 0.08) = 1/3."""


def analysed(
    *rows: Truth | Label | Found, num_classes: int = 2, links: tuple[tuple[int, int], ...] = ()
) -> ErrorAnalysis:
    ground_truths, labels, found = (
        tuple(row for row in rows if isinstance(row, kind)) for kind in (Truth, Label, Found)
    )
    scene = Scene(num_classes, ground_truths, labels, found, links)
    ground_truth, detections = scene.annotations(), scene.detections()
    return analyse_errors(match(detections, ground_truth), detections, ground_truth)


def prices(analysis: ErrorAnalysis, class_name: str = "Class 0") -> dict[str, float]:
    """What is not 0 of the prices of a class."""
    row = analysis.table.set_index("class").loc[class_name]
    return {name: float(row[name]) for name in COSTS if row[name] != 0}


def test_a_run_without_errors_pays_nothing() -> None:
    analysis = analysed(Truth("a", 0, HERE), Found("a", 0, 0.9, HERE))
    assert prices(analysis) == {}
    assert analysis.error.tolist() == [ErrorKind.NONE]
    assert analysis.table["ap"].tolist() == [1.0, 1.0]


def test_a_badly_placed_box_costs_what_moving_it_gains() -> None:
    # One ground truth, one detection at IoU 1/3: AP 0; moved onto the ground truth AP 1. What is pointed at is not
    # missed.
    analysis = analysed(Truth("a", 0, HERE), Found("a", 0, 0.9, NEARBY))
    assert analysis.error.tolist() == [ErrorKind.LOCALISATION]
    assert prices(analysis) == {"localisation": 1.0}


def test_a_moved_box_takes_the_place_of_a_find_with_a_lower_score() -> None:
    # 0.9 badly placed, 0.5 right: precision 1/2 at recall 1. Moved, 0.9 finds it and 0.5 is of no more use: AP 1.
    analysis = analysed(Truth("a", 0, HERE), Found("a", 0, 0.9, NEARBY), Found("a", 0, 0.5, HERE))
    assert analysis.table["ap"].iloc[1] == 0.5
    assert prices(analysis) == {"localisation": 0.5}


def test_a_box_of_the_wrong_class_costs_both_classes() -> None:
    # Class 1's ground truth is called 0 with score 0.9; class 0's own is found with 0.5: AP 1/2 and 0. Renamed: 1 and
    # 1.
    analysis = analysed(Truth("a", 0, FAR), Truth("a", 1, HERE), Found("a", 0, 0.9, HERE), Found("a", 0, 0.5, FAR))
    assert analysis.error.tolist() == [ErrorKind.CONFUSION, ErrorKind.NONE]
    assert prices(analysis, "Class 0") == {"confusion": 0.5}
    assert prices(analysis, "Class 1") == {"confusion": 1.0}
    assert prices(analysis, ALL_CLASSES) == {"confusion": 0.75}
    assert analysis.confusions.to_dict("records") == [
        {
            "class": "Class 0",
            "confused_with": "Class 1",
            "detections": 1,
            "ap": 0.5,
            "class_id": "/m/00",
            "confused_with_id": "/m/01",
        }
    ]
    assert analysis.table.set_index("class")["confused_with"].dropna().to_dict() == {"Class 0": "Class 1"}


def test_a_renamed_box_does_not_find_what_is_found_with_a_higher_score() -> None:
    analysis = analysed(
        Truth("a", 0, FAR),
        Truth("a", 1, HERE),
        Found("a", 1, 0.9, HERE),
        Found("a", 0, 0.8, HERE),
        Found("a", 0, 0.5, FAR),
    )
    assert prices(analysis, "Class 0") == {"confusion": 0.5}
    assert prices(analysis, "Class 1") == {}


def test_a_second_detection_of_a_found_box_is_a_duplicate_even_on_a_box_of_another_class() -> None:
    # Class 0: right, duplicate, right: (1 + 2/3) / 2 = 5/6. Class 1's box lies on the same object.
    analysis = analysed(
        *(Truth("a", 0, HERE), Truth("a", 1, HERE), Truth("a", 0, FAR)),
        *(Found("a", 0, 0.9, HERE), Found("a", 0, 0.8, HERE), Found("a", 0, 0.7, FAR), Found("a", 1, 0.5, HERE)),
    )
    assert analysis.error.tolist() == [ErrorKind.NONE, ErrorKind.DUPLICATE, ErrorKind.NONE, ErrorKind.NONE]
    assert prices(analysis) == {"duplicate": pytest.approx(1 / 6)}


def test_a_detection_of_nothing_is_background_and_its_price_falls_on_what_comes_after() -> None:
    analysis = analysed(Truth("a", 0, HERE), Found("a", 0, 0.9, FAR), Found("a", 0, 0.5, HERE))
    assert analysis.error.tolist() == [ErrorKind.BACKGROUND, ErrorKind.NONE]
    assert prices(analysis) == {"background": 0.5}


def test_a_badly_placed_box_of_the_wrong_class_is_removed_not_put_right() -> None:
    analysis = analysed(
        *(Truth("a", 0, FAR), Truth("a", 1, HERE)),
        *(Found("a", 0, 0.9, NEARBY), Found("a", 0, 0.5, FAR), Found("a", 1, 0.5, HERE)),
    )
    assert analysis.error.tolist() == [ErrorKind.BOTH, ErrorKind.NONE, ErrorKind.NONE]
    assert prices(analysis) == {"both": 0.5}


def test_a_box_that_nothing_points_at_is_missed() -> None:
    # One of two found: AP 1/2; without the missed one 1.
    analysis = analysed(Truth("a", 0, HERE), Truth("a", 0, FAR), Found("a", 0, 0.9, HERE))
    assert prices(analysis) == {"missed": 0.5}
    assert analysis.table["num_missed"].tolist() == [1, 1]


def test_a_class_of_which_everything_is_missed_loses_all_its_ap_to_misses() -> None:
    analysis = analysed(Truth("a", 0, HERE), Found("a", 0, 0.9, FAR))
    assert prices(analysis) == {"missed": 1.0}


def test_group_of_boxes_cost_when_nothing_finds_them_and_by_boxes_that_stick_out() -> None:
    # Group-of box and one ordinary box. The detection of score 0.9 lies to a third inside the group-of box (0.1 <= 1/3
    # < 0.5): wrong, and the group-of box is not hit. AP: right at rank 2, one of two ground-truth boxes: 1/4. Put
    # right: not wrong, and not asked for: 1.
    group = Truth("a", 0, (0.0, 0.0, 0.1, 0.5), group_of=True)
    analysis = analysed(group, Truth("a", 0, FAR), Found("a", 0, 0.9, (0.0, 0.0, 0.3, 0.5)), Found("a", 0, 0.5, FAR))
    assert analysis.error.tolist() == [ErrorKind.GROUP_OF, ErrorKind.NONE]
    assert prices(analysis) == {"group_of": 0.75}
    assert analysis.table["num_group_of"].tolist() == [2, 2]


def test_a_group_of_box_that_absorbed_a_detection_costs_nothing() -> None:
    analysis = analysed(Truth("a", 0, HERE, group_of=True), Found("a", 0, 0.9, (0.0, 0.0, 0.1, 0.1)))
    assert analysis.table["ap"].iloc[1] == 1.0
    assert prices(analysis) == {}


def test_detections_of_unverified_classes_show_what_they_would_cost() -> None:
    # Image b says nothing of class 0, so its detection is not evaluated. Counted as wrong it halves the precision.
    analysis = analysed(Truth("a", 0, HERE), Truth("b", 1, HERE), Found("a", 0, 0.5, HERE), Found("b", 0, 0.9, HERE))
    row = analysis.table.set_index("class").loc["Class 0"]
    assert (row["ap"], row["unverified"], row["num_unverified"]) == (1.0, 0.5, 1)
    assert prices(analysis) == {}


def test_a_detection_on_a_verified_absent_class_is_an_error_as_in_the_metric() -> None:
    analysis = analysed(
        *(Truth("a", 0, HERE), Truth("b", 1, HERE), Label("b", 0, False)),
        *(Found("a", 0, 0.5, HERE), Found("b", 0, 0.9, HERE), Found("b", 1, 0.9, HERE)),
    )
    assert prices(analysis) == {"confusion": 0.5}


def test_a_box_of_a_child_is_an_own_box_of_its_parent_and_a_box_of_the_parent_is_not_of_the_child() -> None:
    # Class 0 > class 1. The parent's detection finds the child's box; the child's detection on the parent's box (where
    # the child is verified absent) is confused with it.
    analysis = analysed(
        *(Truth("a", 1, HERE), Truth("b", 0, HERE), Label("b", 1, False)),
        *(Found("a", 0, 0.9, HERE), Found("b", 1, 0.9, HERE)),
        links=((0, 1),),
    )
    assert analysis.error.tolist() == [ErrorKind.NONE, ErrorKind.CONFUSION]
    assert analysis.confusions["confused_with"].tolist() == ["Class 0"]
    # Parent: found 1 of 2 (AP 1/2); the renamed detection finds the other.
    assert prices(analysis, "Class 0") == {"confusion": 0.5}
    # Child: AP 0, its box was not pointed at by any detection of its own.
    assert prices(analysis, "Class 1") == {"missed": 1.0}


def test_detections_where_no_image_has_a_box_are_background() -> None:
    analysis = analysed(Label("a", 0, False), Found("a", 0, 0.9, HERE))
    assert analysis.error.tolist() == [ErrorKind.BACKGROUND]
    assert len(analysis.table) == 1


def test_no_detections_and_no_truth_are_tables_too() -> None:
    nothing = analysed(Label("a", 0, True))
    assert nothing.table["class"].tolist() == [ALL_CLASSES]
    assert np.isnan(nothing.table["ap"]).all()
    assert len(nothing.confusions) == 0
    assert prices(analysed(Truth("a", 0, HERE))) == {"missed": 1.0}


def random_scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)

    def box() -> Box:
        x, y, w, h = rng.integers(0, 5), rng.integers(0, 5), rng.integers(2, 6), rng.integers(2, 6)
        return (x / 10, y / 10, (x + w) / 10, (y + h) / 10)

    images = [f"i{k}" for k in range(8)]
    ground_truths = tuple(
        Truth(image, int(rng.integers(5)), box(), group_of=bool(rng.random() < 0.15)) for image in images * 5
    )
    labels = tuple(Label(image, int(rng.integers(5)), bool(rng.random() < 0.3)) for image in images)
    found = []
    for row in ground_truths * 2:
        near = rng.random() < 0.5
        label = row.label if rng.random() < 0.6 else int(rng.integers(5))
        found.append(Found(row.image, label, float(rng.integers(1, 100)) / 100, row.box if near else box()))
    return Scene(5, ground_truths, labels, tuple(found), links=((0, 1), (0, 2), (2, 3)))


@pytest.mark.parametrize("seed", range(6))
def test_kinds_agree_with_a_loop_over_all_boxes_whatever_the_size_of_the_pieces(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = random_scene(seed)
    ground_truth, detections = scene.annotations(), scene.detections()
    matches = match(detections, ground_truth)
    if seed % 2:
        monkeypatch.setattr(nearest_ground_truth, "PAIRS_AT_ONCE", 7)
    analysis = analyse_errors(matches, detections, ground_truth)
    image_of_box = np.repeat(np.arange(len(ground_truth.image_ids)), np.diff(ground_truth.box_start))
    for entry, row in enumerate(matches.detection_row):
        if matches.kind[entry] != Kind.FALSE_POSITIVE:
            assert analysis.error[entry] == ErrorKind.NONE
            continue
        label = int(matches.class_index[entry])
        own, other, group = [0.0], [0.0], [0.0]
        for box in np.flatnonzero(image_of_box == matches.image_index[entry]):
            is_own = (
                ground_truth.labels[box] == label or ground_truth.taxonomy.is_ancestor[ground_truth.labels[box], label]
            )
            overlap = float(iou(detections.boxes[[row]], ground_truth.boxes[[box]])[0, 0])
            if not ground_truth.is_group_of[box]:
                (own if is_own else other).append(overlap)
            elif is_own:
                low = np.maximum(detections.boxes[row, :2], ground_truth.boxes[box, :2])
                high = np.minimum(detections.boxes[row, 2:], ground_truth.boxes[box, 2:])
                size = detections.boxes[row, 2:] - detections.boxes[row, :2]
                group.append(float(np.clip(high - low, 0, None).prod() / size.prod()))
        if max(own) >= 0.5:
            expected = ErrorKind.DUPLICATE
        elif max(own) >= 0.1:
            expected = ErrorKind.LOCALISATION
        elif max(other) >= 0.5:
            expected = ErrorKind.CONFUSION
        elif max(group) >= 0.1:
            expected = ErrorKind.GROUP_OF
        else:
            expected = ErrorKind.BOTH if max(other) >= 0.1 else ErrorKind.BACKGROUND
        assert analysis.error[entry] == expected


@pytest.mark.parametrize("seed", range(6))
def test_putting_errors_right_never_lowers_ap_and_never_lifts_it_above_one(seed: int) -> None:
    scene = random_scene(seed)
    ground_truth, detections = scene.annotations(), scene.detections()
    table = analyse_errors(match(detections, ground_truth), detections, ground_truth).table
    for name in (*COSTS, "false_positives", "false_negatives"):
        assert (table[name] > -1e-12).all(), name
        assert (table["ap"] + table[name] < 1 + 1e-12).all(), name
    assert (table["unverified"] > -1e-12).all()


def test_without_any_wrong_detection_and_any_miss_ap_is_one() -> None:
    # AP + false_positives is recall; asking only for what was found makes recall 1.
    scene = random_scene(0)
    ground_truth, detections = scene.annotations(), scene.detections()
    scores = challenge_scores(detections, ground_truth)
    table = analyse_errors(scores.matches, detections, ground_truth).table.iloc[1:]
    right = scores.matches.kind != Kind.FALSE_POSITIVE
    hits = np.bincount(scores.matches.class_index[right], minlength=5)
    recall = (hits / scores.num_truths)[~np.isnan(scores.ap)]
    np.testing.assert_allclose(table["ap"] + table["false_positives"], recall)


def test_the_row_of_all_classes_holds_means_of_costs_and_sums_of_counts() -> None:
    scene = random_scene(1)
    ground_truth, detections = scene.annotations(), scene.detections()
    scores = challenge_scores(detections, ground_truth)
    table = analyse_errors(scores.matches, detections, ground_truth).table
    assert table["ap"].iloc[0] == pytest.approx(scores.mean_ap)
    assert table["missed"].iloc[0] == pytest.approx(table["missed"].iloc[1:].mean())
    assert table["num_background"].iloc[0] == table["num_background"].iloc[1:].sum()
    assert pd.isna(table["class_id"].iloc[0])


def test_matches_of_other_detections_or_images_are_refused() -> None:
    scene = random_scene(0)
    ground_truth, detections = scene.annotations(), scene.detections()
    matches = match(detections, ground_truth)
    with pytest.raises(ValueError, match="must be made of the detections"):
        analyse_errors(matches, detections.take(np.arange(len(detections))[::-1]), ground_truth)
    with pytest.raises(ValueError, match="8 images and the ground truth is of 1"):
        analyse_errors(matches, detections, Scene(5, (Truth("z", 0, HERE),)).annotations())
