"""Detections, batch by batch and process by process -> :class:`Matches`: rules 3 to 5 and 8 put together.

    evaluator = Evaluator(ground_truth)
    for batch in detector:
        evaluator.add(batch)                        # stores candidate matches, not boxes
    evaluator.merge(other_process_evaluator.part()) # a part can be pickled
    matches = evaluator.matches()

The result is the same, bit for bit, in whatever order batches and parts are added: equal scores are ordered by ImageID
and, inside an image, by row. So the detections of one image must come in one batch, in their order, or each with the
row that it has in the predictions file (``rows``); anything else raises ValueError. Cost: that of
:func:`~retinaflow.metric.candidate_matches.candidate_matches` for adding; one sort for the first
:meth:`Evaluator.matches`, none for further thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.candidate_matches import CandidateMatches, GroundTruthByPair, candidate_matches
from retinaflow.metric.ground_truth import Annotations, GroundTruths, count_repeated
from retinaflow.metric.matches import Dropped, Kind, Matches
from retinaflow.metric.matching_rules import match_ranked, ranked


@dataclass(frozen=True)
class Part:
    """All that one evaluator has been given: plain columns, about 45 bytes per evaluated detection."""

    candidates: CandidateMatches
    dropped: Dropped
    num_detections: int
    seen: NDArray[np.bool_]
    """``[I]`` images that had detections."""
    with_rows: bool | None
    """Whether rows were given; None before anything was added."""
    fingerprint: int
    """Of the ground truth that the candidates refer to."""


@dataclass(frozen=True)
class Subset:
    """A part of the ordinary ground-truth boxes, and what belongs to it; group-of boxes play no role.

    A detection with a candidate match belongs to the subset of that ground-truth box, any other where ``candidates``
    is True.
    """

    ground_truths: NDArray[np.bool_]
    """``[T]`` ordinary ground-truth boxes."""
    candidates: NDArray[np.bool_]
    """``[D]`` ranked candidates."""


class Evaluator:
    """Collects detections to evaluate with one ground truth.

    ``classes [K]`` bool: evaluate only these (default: all). Raises ValueError for invalid ground truth, see
    :func:`~retinaflow.metric.ground_truth.expand_boxes`.
    """

    def __init__(self, ground_truth: Annotations, *, classes: NDArray[np.bool_] | None = None) -> None:
        num_classes = len(ground_truth.taxonomy)
        evaluated = np.ones(num_classes, dtype=bool) if classes is None else np.asarray(classes)
        if evaluated.shape != (num_classes,) or evaluated.dtype != np.bool_:
            raise ValueError(f"classes must be bool [{num_classes}], but got {evaluated.dtype} {list(evaluated.shape)}")
        self.ground_truth = GroundTruthByPair(ground_truth, evaluated)
        self._image_ids = np.asarray(ground_truth.image_ids)
        self._verified_labels = len(ground_truth.verified_class)
        self._repeated = count_repeated(self.ground_truth.ground_truths)
        self._parts: list[CandidateMatches] = []
        self._dropped = Dropped()
        self._num_detections = 0
        self._seen = np.zeros(len(self._image_ids), dtype=bool)
        self._with_rows: bool | None = None
        self._ranked: tuple[CandidateMatches, int] | None = None

    def add(self, detections: Detections, *, rows: NDArray[np.integer] | None = None) -> None:
        """Add a batch: all detections of some images, or detections whose ``rows [D]`` in their file are given.

        ``detections.image_index`` counts images of the ground truth; -1 is an image without any annotation. Detections
        are not expanded to parent classes here. Raises ValueError for classes or images outside the ground truth,
        scores that are NaN, and an image that had detections in an earlier batch when rows are not given.
        """
        self._check(detections)
        if rows is not None and np.shape(rows) != (len(detections),):
            raise ValueError(f"rows must have one value per detection, but got {np.shape(rows)}, {len(detections)}")
        if len(detections) == 0:
            return
        seen = np.zeros(len(self._seen), dtype=bool)
        seen[detections.image_index[detections.image_index >= 0]] = True
        self._join(seen, with_rows=rows is not None)
        following = np.arange(len(detections), dtype=np.int64) + self._num_detections
        candidates, dropped = candidate_matches(
            detections, following if rows is None else rows.astype(np.int64), self.ground_truth
        )
        self._parts.append(candidates)
        self._dropped += dropped
        self._num_detections += len(detections)

    def part(self) -> Part:
        """All that was added so far, to be merged into another evaluator of the same ground truth and classes."""
        self._parts = [CandidateMatches.concatenate(self._parts)]
        return Part(
            self._parts[0],
            self._dropped,
            self._num_detections,
            self._seen.copy(),
            self._with_rows,
            self.ground_truth.fingerprint(),
        )

    def merge(self, part: Part) -> None:
        """Add what another evaluator was given. Without rows, its rows are numbered after those here.

        Raises ValueError when it was made with another ground truth or other classes, and for images that both have.
        """
        if part.fingerprint != self.ground_truth.fingerprint():
            raise ValueError("parts must be made with the same ground truth and classes, but got different ones")
        if part.num_detections == 0:
            return
        self._join(part.seen, with_rows=bool(part.with_rows))
        offset = 0 if part.with_rows else self._num_detections
        self._parts.append(replace(part.candidates, row=part.candidates.row + offset))
        self._dropped += part.dropped
        self._num_detections += part.num_detections

    def _join(self, seen: NDArray[np.bool_], *, with_rows: bool) -> None:
        """Note which images have detections. Raises ValueError where the order of equal scores would be undefined."""
        again = np.flatnonzero(self._seen & seen)
        if len(again) and not (with_rows and self._with_rows):
            raise ValueError(
                f"the detections of an image must come in one batch, or with their rows, but image "
                f"{self._image_ids[again[0]]} came in two; add it whole, or give rows="
            )
        self._seen |= seen
        self._with_rows = with_rows if self._with_rows is None else self._with_rows and with_rows
        self._ranked = None

    def ranked_candidates(self) -> CandidateMatches:
        """All candidate matches by class, then by rule 8; cached until more is added."""
        return self._rank()[0]

    def _rank(self) -> tuple[CandidateMatches, int]:
        if self._ranked is None:
            self._parts = [CandidateMatches.concatenate(self._parts)]
            rank = np.empty(len(self._image_ids), dtype=np.int64)
            rank[np.argsort(self._image_ids, kind="stable")] = np.arange(len(rank))
            self._ranked = ranked(self._parts[0], self.ground_truth, rank)
        return self._ranked

    def matches(
        self, *, iou_threshold: float = 0.5, group_of_weight: float = 1.0, subset: Subset | None = None
    ) -> Matches:
        """Which of the detections so far are true positives, false positives, absorbed or dropped.

        ``group_of_weight`` in [0, 1]: 1 is the Challenge, 0 the older Open Images V2 rule. ``subset``: only a part of
        the ground-truth boxes, and what belongs to it. Raises ValueError for settings out of range.
        """
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"`0 < iou_threshold <= 1` must hold, but got {iou_threshold}")
        if not 0 <= group_of_weight <= 1:
            raise ValueError(f"`0 <= group_of_weight <= 1` must hold, but got {group_of_weight}")
        candidates, over_limit = self._rank()
        with_group_of = group_of_weight > 0 and subset is None
        matching = match_ranked(candidates, self.ground_truth, iou_threshold=iou_threshold, with_group_of=with_group_of)
        entry, kind, ground_truths = matching.candidate, matching.kind, self.ground_truth.ground_truths
        if subset is not None:
            inside = _belongs(
                candidates.take(entry), subset.ground_truths, subset.candidates[entry], iou_threshold=iou_threshold
            )
            entry, kind, ground_truths = (
                entry[inside],
                kind[inside],
                self.ground_truth.ordinary.take(subset.ground_truths),
            )
        num_classes = len(self.ground_truth.evaluated)
        image_of_pair, class_of_pair = np.divmod(self.ground_truth.pairs, max(num_classes, 1))
        pair_index = candidates.pair_index[entry]
        gt_image, gt_class, gt_count = _count_ground_truths(ground_truths, num_classes, group_of_weight)
        return Matches(
            image_index=image_of_pair[pair_index],
            class_index=class_of_pair[pair_index],
            score=candidates.score[entry],
            kind=kind,
            weight=np.where(kind == Kind.GROUP_OF, group_of_weight, 1.0),
            detection_row=candidates.row[entry],
            gt_image=gt_image,
            gt_class=gt_class,
            gt_count=gt_count,
            image_ids=self._image_ids,
            evaluated=self.ground_truth.evaluated,
            dropped=self._dropped + Dropped(over_limit=over_limit, not_exhaustive=matching.not_exhaustive),
            absorbed=matching.absorbed,
            verified_labels=self._verified_labels,
            repeated_ground_truths=self._repeated,
            iou_threshold=iou_threshold,
            group_of_weight=group_of_weight,
        )

    def _check(self, detections: Detections) -> None:
        bounds = (
            ("image", detections.image_index, -1, len(self._image_ids)),
            ("class", detections.class_index, 0, len(self.ground_truth.evaluated)),
        )
        for what, column, low, high in bounds:
            if len(column) and (column.min() < low or column.max() >= high):
                row = np.flatnonzero((column < low) | (column >= high))[0]
                raise ValueError(
                    f"`{low} <= {what} index < {high}` must hold for every detection, "
                    f"but row {row} has {int(column[row])}"
                )
        missing = np.isnan(detections.score)
        if missing.any():
            raise ValueError(f"scores must be numbers, but row {np.flatnonzero(missing)[0]} has NaN")


def _belongs(
    candidates: CandidateMatches, ground_truths: NDArray[np.bool_], others: NDArray[np.bool_], *, iou_threshold: float
) -> NDArray[np.bool_]:
    """Whether each candidate matches a chosen ground-truth box; for one that matches no box at all, ``others``."""
    has_match = candidates.iou >= iou_threshold
    belongs = others.copy()
    belongs[has_match] = ground_truths[candidates.ordinary[has_match]]
    return belongs


def _count_ground_truths(
    ground_truths: GroundTruths, num_classes: int, group_of_weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rule 5 per image and class: (image, class ascending, count)."""
    new = np.ones(len(ground_truths), dtype=bool)
    new[1:] = ground_truths.pair[1:] != ground_truths.pair[:-1]
    first = np.flatnonzero(new)
    weight = np.where(ground_truths.is_group_of, group_of_weight, 1.0)
    count = np.bincount(np.cumsum(new) - 1, weight, minlength=len(first)).astype(np.float64)
    image, class_index = np.divmod(ground_truths.pair[first], max(num_classes, 1))
    order = np.argsort(class_index, kind="stable")
    return image[order], class_index[order], count[order]
