"""The Open Images Challenge metric: the published cases, a slow reference, hand-worked scenes, and invariants."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

import hypothesis.strategies as st
import numpy as np
import pytest
import slow_challenge
from hypothesis import given, settings
from scoring_scenes import CASE_NAMES, CASES, Found, Label, Scene, Truth, read_case

from retinaflow.detections import Detections
from retinaflow.metric import candidate_matches
from retinaflow.metric.challenge import Kind, average_precision, challenge_scores, match, mean_of_classes

NAN = float("nan")
Row = TypeVar("Row", Truth, Label, Found)
LEFT, RIGHT, FAR = (0.0, 0.0, 0.4, 0.4), (0.5, 0.0, 0.9, 0.4), (0.6, 0.6, 0.7, 0.7)

# A coarse grid makes equal scores, equal overlaps, overlaps of exactly one half and boxes without area common.
grid = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
boxes = st.tuples(grid, grid, grid, grid)
proper_boxes = boxes.filter(slow_challenge.is_valid)
images = st.sampled_from(["b", "a", "c10", "c9"])
scores = st.sampled_from([-0.5, 0.0, 0.1, 0.2, 0.3, 0.5, 0.9])


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    count = draw(st.integers(1, 5))
    classes = st.integers(0, count - 1)
    # Links from a lower to a higher index cannot make a cycle, and give a class several parents.
    pairs = [(parent, child) for parent in range(count) for child in range(parent + 1, count)]
    links = draw(st.lists(st.sampled_from(pairs), max_size=4, unique=True)) if pairs else []
    ground_truths = draw(
        st.lists(
            st.builds(Truth, images, classes, proper_boxes, st.booleans(), st.sampled_from([False, False, True])),
            max_size=10,
        )
    )
    labels = draw(st.lists(st.builds(Label, images, classes, st.booleans()), max_size=6))
    near_truth = st.sampled_from([row.box for row in ground_truths]) if ground_truths else boxes
    found = draw(st.lists(st.builds(Found, images, classes, scores, near_truth | boxes), max_size=16))
    return Scene(count, tuple(ground_truths), tuple(labels), tuple(found), tuple(links))


def one_class(ground_truths: list[Truth], found: list[Found], *labels: Label) -> Scene:
    return Scene(1, tuple(ground_truths), labels or (Label("i1", 0, True),), tuple(found))


def ap_of(scene: Scene, *, group_of_weight: float = 1.0) -> list[float]:
    return challenge_scores(scene.detections(), scene.annotations(), group_of_weight=group_of_weight).ap.tolist()


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("name", CASE_NAMES)
def test_the_published_cases_give_the_values_of_the_reference(name: str, weight: int) -> None:
    if not CASES.is_dir():
        pytest.skip(f"no metric cases at {CASES}")
    ground_truth, detections = read_case(CASES / name)
    expected = json.loads((CASES / name / f"expected_weight_{weight}.json").read_text())
    result = challenge_scores(detections, ground_truth, group_of_weight=weight)
    rows = [expected["per_class"][mid] for mid in ground_truth.taxonomy.ids]
    wanted = [NAN if row["AP_forward"] is None else row["AP_forward"] for row in rows]
    np.testing.assert_allclose(result.ap, wanted, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(result.num_truths, [row["num_gt"] for row in rows])
    mean = NAN if expected["mAP_forward"] is None else expected["mAP_forward"]
    assert result.mean_ap == pytest.approx(mean, abs=1e-9, nan_ok=True)
    assert result.num_classes_in_mean == expected["num_classes_in_mean"]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(scene=scenes(), weight=st.sampled_from([0.0, 0.25, 1.0]), threshold=st.sampled_from([0.25, 0.5, 1.0]))
def test_any_scene_scores_as_the_slow_reference_says(scene: Scene, weight: float, threshold: float) -> None:
    expected = slow_challenge.slow_ap(scene, iou_threshold=threshold, group_of_weight=weight)
    result = challenge_scores(scene.detections(), scene.annotations(), iou_threshold=threshold, group_of_weight=weight)
    np.testing.assert_allclose(result.ap, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.mean_ap, slow_challenge.mean(expected), rtol=0, atol=1e-9)


def large_scene(seed: int) -> Scene:
    """2,000 images, 60 classes with several parents, 100,000 detections; scores on a grid, so that many are equal."""
    rng = np.random.default_rng(seed)
    links = tuple(
        {(int(rng.integers(0, child)), child) for child in range(5, 60) for _ in range(2) if rng.random() < 0.4}
    )
    names = [f"{number:x}" for number in range(2000)]

    def boxes_at(low: np.ndarray, side: np.ndarray) -> list[tuple[float, float, float, float]]:
        return [tuple(row) for row in np.concatenate([low, low + side], axis=1).tolist()]

    image, label = rng.integers(0, 2000, 12_000), rng.integers(0, 60, 12_000)
    low, side = rng.random((12_000, 2)) * 0.5, 0.1 + 0.4 * rng.random((12_000, 2))
    group_of = rng.random(12_000) < 0.1
    ground_truths = [
        Truth(names[i], int(c), box, bool(g))
        for i, c, box, g in zip(image, label, boxes_at(low, side), group_of, strict=True)
    ]
    labels = [
        Label(names[i], int(c), bool(p))
        for i, c, p in zip(rng.integers(0, 2000, 8000), rng.integers(0, 60, 8000), rng.random(8000) < 0.5, strict=True)
    ]
    near = rng.integers(0, 12_000, 100_000)
    shift, scale = rng.normal(0, 0.03, (100_000, 2)), rng.normal(1, 0.2, (100_000, 2))
    guess = np.where(rng.random(100_000) < 0.8, label[near], rng.integers(0, 60, 100_000))
    found = [
        Found(names[image[n]], int(c), score, box)
        for n, c, score, box in zip(
            near,
            guess,
            (rng.integers(0, 200, 100_000) / 200).tolist(),
            boxes_at(low[near] + shift, side[near] * scale),
            strict=True,
        )
    ]
    return Scene(60, tuple(ground_truths), tuple(labels), tuple(found), links)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_hundred_thousand_detections_score_as_the_slow_reference_says(weight: float) -> None:
    scene = large_scene(0)
    expected = slow_challenge.slow_ap(scene, group_of_weight=weight)
    result = challenge_scores(scene.detections(), scene.annotations(), group_of_weight=weight)
    np.testing.assert_allclose(result.ap, expected, rtol=0, atol=1e-9)
    assert result.matches.absorbed > 1000
    assert min(result.dropped.invalid_box, result.dropped.not_verified) >= 0
    assert 0.1 < result.mean_ap < 0.9


def test_overlaps_computed_in_many_pieces_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.5, (200, 2))
    rows = [tuple(np.round([*c, *(c + 0.4)], 1).tolist()) for c in corners]
    scene = Scene(
        2,
        tuple(Truth(f"i{k % 3}", k % 2, rows[k], k % 5 == 0) for k in range(100)),
        found=tuple(Found(f"i{k % 3}", k % 2, k % 7 / 7, rows[k]) for k in range(100, 200)),
    )
    whole = ap_of(scene)
    assert 0 < whole[0] < 1
    for size in (1, 7, 50):
        monkeypatch.setattr(candidate_matches, "BLOCK", size)
        assert ap_of(scene) == whole


def test_nothing_at_all_scores_nan_without_a_warning() -> None:
    result = challenge_scores(Detections.empty(), Scene(3).annotations())
    assert np.isnan(result.ap).all()
    assert np.isnan(result.mean_ap)
    assert result.num_classes_in_mean == 0
    assert result.dropped.total == 0


def test_a_taxonomy_without_classes_has_an_empty_score() -> None:
    assert challenge_scores(Detections.empty(), Scene(0).annotations()).ap.shape == (0,)


def test_a_class_with_truth_and_no_detection_scores_zero_and_counts_in_the_mean() -> None:
    scene = Scene(3, (Truth("i1", 0, LEFT), Truth("i1", 1, LEFT)), (), (Found("i1", 0, 0.9, LEFT),))
    result = challenge_scores(scene.detections(), scene.annotations())
    np.testing.assert_array_equal(result.ap, [1, 0, NAN])
    # Classes 0 and 1 have ground truth: (1 + 0) / 2.
    assert result.mean_ap == 0.5


def test_average_precision_is_the_area_under_the_curve_worked_by_hand() -> None:
    # Three ground-truth boxes; by score: right, wrong, right, (third ground truth never found).
    #   recall    1/3   1/3   2/3
    #   precision 1     1/2   2/3     made non-increasing from the right: 1, 2/3, 2/3
    # AP = 1/3 x 1 + 1/3 x 2/3
    scene = one_class(
        [Truth("i1", 0, LEFT), Truth("i1", 0, RIGHT), Truth("i2", 0, LEFT)],
        [Found("i1", 0, 0.9, LEFT), Found("i2", 0, 0.8, FAR), Found("i1", 0, 0.7, RIGHT)],
    )
    assert ap_of(scene) == [pytest.approx(1 / 3 + 1 / 3 * 2 / 3)]


def test_a_detection_whose_nearest_truth_is_taken_has_no_second_choice() -> None:
    # IoU with A = [0, 1], B = [0.2, 1.2] (unit height): the first detection is A itself and takes A.
    # The second, [0, 1] again, has IoU 1 with A (taken) and 0.8 / 1.2 = 2/3 with B (free): still a false positive.
    # Entries: right, wrong; two ground-truth boxes: AP = 1/2 x 1.
    a, b = (0.0, 0.0, 1.0, 1.0), (0.2, 0.0, 1.2, 1.0)
    scene = one_class([Truth("i1", 0, a), Truth("i1", 0, b)], [Found("i1", 0, 0.9, a), Found("i1", 0, 0.8, a)])
    assert ap_of(scene) == [0.5]


def test_of_equally_near_truths_the_first_published_row_is_taken_even_among_many() -> None:
    # The first detection has IoU 0.375 / 0.625 = 0.6 with both a and b; it must take the one that comes first, so that
    # the second detection, b itself, finds b free only when a is published before b.
    a, between, b = (0.0, 0.0, 0.5, 1.0), (0.125, 0.0, 0.625, 1.0), (0.25, 0.0, 0.75, 1.0)
    for order, right in (((a, b), 2), ((b, a), 1)):
        rows = [order[0], *[FAR] * 60, order[1], *[FAR] * 60]
        scene = one_class([Truth("i1", 0, box) for box in rows], [Found("i1", 0, 0.9, between), Found("i1", 0, 0.8, b)])
        assert match(scene.detections(), scene.annotations()).kind.tolist().count(Kind.TRUE_POSITIVE) == right


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # Curve: 0.9 right, 0.8 wrong (0.7 and 0.6 absorbed, leave no trace); one ground truth: AP 1.
        pytest.param(0.0, 1.0, id="weight 0"),
        # Curve: 0.9 right, 0.8 wrong, 0.7 group-of (one entry for both absorbed); two ground-truth boxes, precisions 1,
        # 1/2, 2/3: AP = 1/2 x 1 + 1/2 x 2/3.
        pytest.param(1.0, 1 / 2 + 1 / 2 * 2 / 3, id="weight 1"),
        # Count 1.5; precision at the group-of entry 1.5 / 2.5: AP = 1 / 1.5 x 1 + 0.5 / 1.5 x 0.6.
        pytest.param(0.5, 2 / 3 + 1 / 3 * 0.6, id="weight 0.5"),
    ],
)
def test_a_group_of_box_absorbs_detections_and_counts_once_with_its_weight(weight: float, expected: float) -> None:
    group = (0.5, 0.0, 1.0, 0.5)
    scene = one_class(
        [Truth("i1", 0, LEFT), Truth("i1", 0, group, True)],
        [
            Found("i1", 0, 0.9, LEFT),
            Found("i1", 0, 0.8, FAR),
            Found("i1", 0, 0.7, (0.5, 0.0, 0.6, 0.1)),
            Found("i1", 0, 0.6, (0.8, 0.2, 0.9, 0.3)),
        ],
    )
    assert ap_of(scene, group_of_weight=weight) == [pytest.approx(expected)]


def test_a_group_of_box_that_absorbed_nothing_is_a_miss_at_weight_one_only() -> None:
    scene = one_class([Truth("i1", 0, LEFT), Truth("i1", 0, RIGHT, True)], [Found("i1", 0, 0.9, LEFT)])
    assert ap_of(scene, group_of_weight=1.0) == [0.5]
    assert ap_of(scene, group_of_weight=0.0) == [1.0]


def test_unmatched_detections_of_a_class_that_is_not_exhaustive_are_ignored() -> None:
    # Class 0 above 1 and 2. On "a" class 1 has boxes LEFT and a group-of RIGHT, and more objects without a box; on "b"
    # it has LEFT alone.
    scene = Scene(
        3,
        (Truth("a", 1, LEFT, not_exhaustive=True), Truth("a", 1, RIGHT, group_of=True), Truth("b", 1, LEFT)),
        (Label("a", 2, False),),
        (
            Found("a", 1, 0.9, FAR),  # matches nothing: ignored
            Found("a", 2, 0.9, FAR),  # absent: false
            Found("a", 1, 0.8, LEFT),  # true
            Found("a", 1, 0.7, LEFT),  # a second one on the box: ignored
            Found("a", 1, 0.6, RIGHT),  # absorbed
            Found("b", 1, 0.5, FAR),  # false
            Found("b", 1, 0.4, LEFT),  # true
            Found("a", 0, 0.3, FAR),  # what is not exhaustive below is not above: ignored
            Found("b", 0, 0.2, FAR),  # false
            Found("b", 0, 0.1, LEFT),  # true
        ),
        links=((0, 1), (0, 2)),
    )
    result = challenge_scores(scene.detections(), scene.annotations())
    # Class 1: true, group-of, false, true of 3. Class 0: false, true of 3.
    np.testing.assert_allclose(result.ap, [1 / 3 * 1 / 2, 1 / 3 + 1 / 3 + 1 / 3 * 3 / 4, NAN])
    assert (result.dropped.not_exhaustive, result.dropped.total, result.matches.absorbed) == (3, 3, 1)
    assert result.matches.detection_row.tolist() == [8, 9, 2, 4, 5, 6, 1]
    assert result.not_a_challenge_score == (
        "3 detections of classes that are not exhaustive on their image (IsNotExhaustive) are ignored",
    )
    # All false where every object has a box: class 1 f t f g f t, class 0 f f t.
    closed = replace(scene, ground_truths=tuple(replace(row, not_exhaustive=False) for row in scene.ground_truths))
    assert ap_of(closed) == [pytest.approx(1 / 3 * 1 / 3), pytest.approx(1 / 2), pytest.approx(NAN, nan_ok=True)]


@pytest.mark.parametrize("score", [0.0, -1.0])
def test_a_group_of_box_that_absorbed_only_scores_up_to_zero_makes_no_entry(score: float) -> None:
    scene = one_class([Truth("i1", 0, LEFT, True)], [Found("i1", 0, score, LEFT)])
    matches = match(scene.detections(), scene.annotations())
    assert (len(matches.score), matches.absorbed) == (0, 1)


def test_group_of_boxes_are_hit_by_their_share_of_the_detection_and_not_by_iou() -> None:
    # A detection of 0.1 x 0.1 inside a group of 1 x 1: IoU 0.01, intersection over its own area 1.
    scene = one_class([Truth("i1", 0, (0, 0, 1, 1), True)], [Found("i1", 0, 0.9, (0.2, 0.2, 0.3, 0.3))])
    assert match(scene.detections(), scene.annotations()).kind.tolist() == [Kind.GROUP_OF]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        # The right one comes first on image "a": precision 1 at recall 1.
        pytest.param(("a", "b"), 1.0, id="right image sorts first"),
        # The wrong one, on "a", comes first: precision 1/2.
        pytest.param(("b", "a"), 0.5, id="wrong image sorts first"),
        # As strings "i10" < "i9".
        pytest.param(("i10", "i9"), 1.0, id="ids sort as strings"),
    ],
)
def test_equal_scores_are_ordered_by_image_id_as_a_string(order: tuple[str, str], expected: float) -> None:
    right, wrong = order
    labels = (Label(wrong, 0, False), Label(right, 0, True))
    found = (Found(wrong, 0, 0.5, LEFT), Found(right, 0, 0.5, LEFT))
    scene = Scene(1, (Truth(right, 0, LEFT),), labels, found)
    assert ap_of(scene) == [expected]
    assert ap_of(replace(scene, labels=labels[::-1], found=found[::-1])) == [expected]


def test_equal_scores_inside_an_image_keep_the_order_of_their_rows() -> None:
    right, wrong = Found("i1", 0, 0.5, LEFT), Found("i1", 0, 0.5, FAR)
    assert ap_of(one_class([Truth("i1", 0, LEFT)], [right, wrong])) == [1.0]
    assert ap_of(one_class([Truth("i1", 0, LEFT)], [wrong, right])) == [0.5]


def test_a_group_of_entry_comes_after_a_detection_of_equal_score_in_its_image() -> None:
    # Wrong first, then the group-of entry, though the absorbed row came first: precision 1/2.
    scene = one_class([Truth("i1", 0, LEFT, True)], [Found("i1", 0, 0.5, LEFT), Found("i1", 0, 0.5, FAR)])
    assert ap_of(scene) == [0.5]


def test_truth_is_expanded_to_every_ancestor_once_even_by_two_ways() -> None:
    # A diamond: 3 below 1 and 2, both below 0. The box gives each of the four classes one ground truth.
    links = ((0, 1), (0, 2), (1, 3), (2, 3))
    scene = Scene(4, (Truth("i1", 3, LEFT),), links=links)
    result = challenge_scores(scene.detections(), scene.annotations())
    assert result.num_truths.tolist() == [1, 1, 1, 1]
    assert result.matches.repeated_ground_truths == 0


def test_detections_are_not_expanded() -> None:
    scene = Scene(2, (Truth("i1", 1, LEFT),), (), (Found("i1", 1, 0.9, LEFT),), links=((0, 1),))
    assert ap_of(scene) == [0.0, 1.0]


def test_a_box_given_under_child_and_parent_counts_twice_and_is_reported() -> None:
    scene = Scene(2, (Truth("i1", 1, LEFT), Truth("i1", 0, LEFT)), links=((0, 1),))
    result = challenge_scores(scene.detections(), scene.annotations())
    assert result.num_truths.tolist() == [2, 1]
    assert result.matches.repeated_ground_truths == 1


@pytest.mark.parametrize(
    ("label", "verified"),
    [
        pytest.param(Label("i1", 1, True), [True, True, False], id="present goes up"),
        pytest.param(Label("i1", 1, False), [False, True, True], id="absent goes down"),
    ],
)
def test_image_labels_verify_ancestors_when_present_and_descendants_when_absent(
    label: Label, verified: list[bool]
) -> None:
    found = tuple(Found("i1", c, 0.9, LEFT) for c in range(3))
    scene = Scene(3, (), (label,), found, links=((0, 1), (1, 2)))
    matches = match(scene.detections(), scene.annotations())
    assert [c in matches.class_index for c in range(3)] == verified
    assert matches.dropped.not_verified == 3 - sum(verified)
    assert matches.verified_labels == 1


def test_every_detection_is_an_entry_absorbed_or_dropped_for_one_counted_reason() -> None:
    found = (
        Found("nowhere", 0, 0.9, LEFT),  # the image has no annotation
        Found("i1", 2, 0.9, LEFT),  # class 2 is not among the evaluated classes
        Found("i1", 1, 0.9, LEFT),  # class 1 is not verified on i1
        Found("i1", 0, 0.9, (0.4, 0.0, 0.4, 0.4)),  # no width
        Found("i1", 0, 0.8, LEFT),  # an entry
        Found("i1", 0, 0.7, RIGHT),  # absorbed
    )
    ground_truths = (Truth("i1", 0, LEFT), Truth("i1", 0, RIGHT, True), Truth("i1", 2, LEFT))
    scene = Scene(3, ground_truths, (), found)
    matches = match(scene.detections(), scene.annotations(), classes=np.array([True, True, False]), group_of_weight=0)
    dropped = matches.dropped
    assert (dropped.unknown_image, dropped.class_not_evaluated, dropped.not_verified, dropped.invalid_box) == (
        1,
        1,
        1,
        1,
    )
    assert (matches.detection_row.tolist(), matches.absorbed, dropped.total) == ([4], 1, 4)


def test_detections_beyond_ten_thousand_of_an_image_and_class_are_dropped_lowest_scores_first() -> None:
    scene = one_class([Truth("i1", 0, LEFT)], [])
    count = 10_003
    score = np.linspace(0.1, 0.9, count)
    box = np.tile(np.array([FAR]), (count, 1))
    # The only right detection has the third-lowest score, the last place that is cut.
    box[2] = LEFT
    zeros = np.zeros(count, dtype=np.int32)
    result = challenge_scores(Detections(zeros, zeros, score, box), scene.annotations())
    assert result.dropped.over_limit == 3
    assert result.ap.tolist() == [0.0]
    assert (
        challenge_scores(Detections(zeros[2:], zeros[2:], score[2:], box[2:]), scene.annotations()).dropped.over_limit
        == 1
    )


def test_classes_that_are_not_asked_for_are_nan_and_leave_the_others_alone() -> None:
    ground_truths = (Truth("i1", 1, LEFT), Truth("i1", 2, RIGHT))
    found = (Found("i1", 0, 0.9, LEFT), Found("i1", 2, 0.5, FAR), Found("i1", 2, 0.4, RIGHT))
    scene = Scene(3, ground_truths, (), found, links=((0, 1),))
    # Class 0 has its ground truth from its child 1, though 1 itself is not evaluated.
    result = challenge_scores(scene.detections(), scene.annotations(), classes=np.array([True, False, True]))
    np.testing.assert_array_equal(result.ap, [1.0, NAN, 0.5])
    assert result.num_truths.tolist() == [1, 0, 1]
    assert result.not_a_challenge_score[-1] == "only 2 of 3 classes were evaluated"


def test_only_the_full_rules_with_image_labels_may_be_called_a_challenge_score() -> None:
    scene = one_class([Truth("i1", 0, LEFT)], [])
    assert challenge_scores(scene.detections(), scene.annotations()).not_a_challenge_score == ()
    without = replace(scene, labels=()).annotations()
    assert "no image-level labels" in challenge_scores(scene.detections(), without).not_a_challenge_score[0]
    relaxed = challenge_scores(scene.detections(), scene.annotations(), iou_threshold=0.4, group_of_weight=0)
    assert len(relaxed.not_a_challenge_score) == 2


@settings(max_examples=100, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 100))
def test_permuting_detections_of_distinct_scores_changes_nothing(scene: Scene, seed: int) -> None:
    found = [replace(row, score=0.1 + k / 100) for k, row in enumerate(scene.found)]
    shuffled = [found[k] for k in np.random.default_rng(seed).permutation(len(found))]
    scores = [ap_of(replace(scene, found=tuple(rows))) for rows in (found, shuffled)]
    np.testing.assert_array_equal(*scores)


@settings(max_examples=100, deadline=None)
@given(scene=scenes(), power=st.sampled_from([0.5, 3.0]))
def test_only_the_order_of_the_scores_matters(scene: Scene, power: float) -> None:
    positive = [replace(row, score=row.score + 1) for row in scene.found]
    scene = replace(scene, found=tuple(positive))
    stretched = replace(scene, found=tuple(replace(row, score=row.score**power) for row in positive))
    np.testing.assert_array_equal(ap_of(scene), ap_of(stretched))


@settings(max_examples=100, deadline=None)
@given(scene=scenes())
def test_every_image_twice_under_another_id_keeps_the_ap(scene: Scene) -> None:
    found = tuple(replace(row, score=0.1 + k / 100) for k, row in enumerate(scene.found))
    scene = replace(scene, found=found)
    # Scores are distinct in the scene and the copy sorts right behind its original, so each entry is followed by its
    # copy: a run of right entries ends at the same precision, and recall grows to the same values.
    twice = replace(
        scene,
        ground_truths=scene.ground_truths + tuple(replace(row, image=row.image + "+") for row in scene.ground_truths),
        labels=scene.labels + tuple(replace(row, image=row.image + "+") for row in scene.labels),
        found=found + tuple(replace(row, image=row.image + "+") for row in found),
    )
    np.testing.assert_allclose(ap_of(twice), ap_of(scene), rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 100))
def test_image_weights_score_as_so_many_copies_of_the_images(scene: Scene, seed: int) -> None:
    scene = replace(scene, found=tuple(replace(row, score=0.1 + k / 100) for k, row in enumerate(scene.found)))
    ids = scene.image_ids
    times = np.random.default_rng(seed).integers(0, 4, len(ids))
    copies = [(image, f"{image}+{k}") for image, n in zip(ids, times, strict=True) for k in range(n)]

    def repeat(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(replace(row, image=copy) for image, copy in copies for row in rows if row.image == image)

    repeated = replace(
        scene, ground_truths=repeat(scene.ground_truths), labels=repeat(scene.labels), found=repeat(scene.found)
    )
    weighted = average_precision(match(scene.detections(), scene.annotations()), image_weights=times)
    np.testing.assert_allclose(weighted, ap_of(repeated), rtol=0, atol=1e-12)


def test_many_image_weights_at_once_score_as_one_after_the_other() -> None:
    scene = Scene(
        2,
        (Truth("i1", 0, LEFT), Truth("i2", 0, LEFT), Truth("i2", 1, RIGHT)),
        found=(Found("i1", 0, 0.9, FAR), Found("i2", 0, 0.8, LEFT), Found("i2", 1, 0.8, RIGHT)),
    )
    matches = match(scene.detections(), scene.annotations())
    weights = np.array([[1, 1], [2, 0], [0, 3]])
    together = average_precision(matches, image_weights=weights)
    # All: one of two found at precision 1/2. Only i1: not found, and class 1 has no ground truth. Only i2: all found.
    np.testing.assert_array_equal(together, [[0.25, 1], [0, NAN], [1, 1]])
    np.testing.assert_array_equal(together, [average_precision(matches, image_weights=row) for row in weights])
    with pytest.raises(ValueError, match=r"image_weights must be \[2\] or \[R, 2\]"):
        average_precision(matches, image_weights=np.ones(3, dtype=np.int64))


def test_the_mean_leaves_out_nan_and_is_nan_without_any_number() -> None:
    ap = np.array([0.2, NAN, 0.6])
    assert mean_of_classes(ap) == pytest.approx(0.4)
    assert mean_of_classes(ap, np.array([True, True, False])) == pytest.approx(0.2)
    assert np.isnan(mean_of_classes(ap, np.array([False, True, False])))


def test_extreme_coordinates_and_scores_do_not_disturb_the_scores() -> None:
    huge = (-1e150, -1e150, 1e150, 1e150)
    scene = one_class(
        [Truth("i1", 0, LEFT)],
        [
            Found("i1", 0, float("inf"), huge),
            Found("i1", 0, 5e-324, LEFT),
            Found("i1", 0, float("-inf"), (0, 0, NAN, 1)),
        ],
    )
    result = challenge_scores(scene.detections(), scene.annotations())
    assert (result.ap.tolist(), result.dropped.invalid_box) == ([0.5], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iou_threshold": 0.0}, "`0 < iou_threshold <= 1` must hold, but got 0.0"),
        ({"group_of_weight": 1.5}, "`0 <= group_of_weight <= 1` must hold, but got 1.5"),
        ({"classes": np.array([True])}, r"classes must be bool \[2\], but got bool \[1\]"),
        ({"classes": np.array([0, 1])}, r"classes must be bool \[2\], but got int64 \[2\]"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(Detections.empty(), Scene(2).annotations(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_index": np.array([0, 1], np.int32)}, "`-1 <= image index < 1` .* row 1 has 1"),
        ({"image_index": np.array([-2, 0], np.int32)}, "`-1 <= image index < 1` .* row 0 has -2"),
        ({"class_index": np.array([0, 2], np.int32)}, "`0 <= class index < 2` .* row 1 has 2"),
        ({"score": np.array([0.5, NAN])}, "scores must be numbers, but row 1 has NaN"),
    ],
)
def test_a_detection_that_cannot_be_evaluated_is_named_by_its_row(change: dict[str, object], message: str) -> None:
    ground_truth = Scene(2, (Truth("i1", 0, LEFT),)).annotations()
    columns = {"image_index": np.zeros(2, np.int32), "class_index": np.zeros(2, np.int32), "score": np.ones(2)}
    with pytest.raises(ValueError, match=message):
        match(Detections(**{**columns, "boxes": np.ones((2, 4)), **change}), ground_truth)


def test_truth_outside_the_taxonomy_or_without_finite_boxes_is_named_by_its_row() -> None:
    ground_truth = Scene(2, (Truth("i1", 0, LEFT),), (Label("i1", 1, True),)).annotations()
    with pytest.raises(ValueError, match=r"`0 <= class < 2` must hold for every box, but row 0 has class 2"):
        match(Detections.empty(), replace(ground_truth, labels=np.array([2], np.int32)))
    with pytest.raises(ValueError, match=r"for every image-level label, but row 0 has class -1"):
        match(Detections.empty(), replace(ground_truth, verified_class=np.array([-1], np.int32)))
    with pytest.raises(ValueError, match="ground truth boxes must be finite, but box row 0"):
        match(Detections.empty(), replace(ground_truth, boxes=np.full((1, 4), NAN)))
