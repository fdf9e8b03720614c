"""Scores with the same meaning in every class: from "0.7" to the fraction of such detections that are true positives.

The scores of a detector are not probabilities, and the scales of two detectors differ. A :class:`Calibrator` maps the
scores of one class of one detector by a rising function, fitted to detections that the Challenge's matching has
evaluated:

- ``platt``: sigmoid(a * logit(score) + b), a > 0, by maximum likelihood with Platt's targets (N+ + 1) / (N+ + 2) for
  true positives and 1 / (N- + 2) for false positives (Platt 1999, section 2.2);
- ``isotonic``: the rising step function of least squares (pool adjacent violators; Zadrozny and Elkan 2002), linear
  between the centres of its steps, limited to 1 / (N + 2) from 0 and 1;
- ``none``: the score itself.

:func:`choose_method` chooses by the likelihood of detections on images that were not in the fit. A millionth of the
score itself is added, so that every calibrator rises strictly: the order of one class's detections from one model, and
with it the AP of the class, does not change.

Cost of a fit: linear in the evaluated detections (isotonic: after a sort).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from retinaflow.detections import Detections
from retinaflow.errors import DataError, shown

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Method = Literal["none", "platt", "isotonic"]
METHODS: tuple[Method, ...] = ("none", "platt", "isotonic")
"""Of equal methods the first is chosen: the simplest."""

TIE_BREAK = 1e-6
SMALLEST_SLOPE = 0.01
_NEAR_ZERO = 1e-12


@dataclass(frozen=True)
class Calibrator:
    """A strictly rising map of scores in [0, 1] to [0, 1].

    ``points``: for platt ``(a, b)``; for isotonic the centres of the steps, scores first, then as many values; else
    empty.
    """

    method: Method = "none"
    points: tuple[float, ...] = ()

    def __call__(self, score: NDArray[np.floating]) -> FloatArray:
        """Calibrated scores, of the same shape, float64."""
        raw = np.asarray(score, dtype=np.float64)
        if self.method == "none":
            return raw
        if self.method == "platt":
            slope, intercept = self.points
            probability = expit(slope * _logit(raw) + intercept)
        else:
            half = len(self.points) // 2
            probability = np.interp(raw, self.points[:half], self.points[half:])
        return np.asarray((1 - TIE_BREAK) * probability + TIE_BREAK * raw, dtype=np.float64)

    def to_document(self) -> dict[str, Any]:
        """JSON values that :meth:`from_document` reads."""
        return {"method": self.method, "points": list(self.points)}

    @staticmethod
    def from_document(document: dict[str, Any]) -> Calibrator:
        """The calibrator of :meth:`to_document`. Raises DataError for any other document."""
        method, points = (document.get("method"), document.get("points")) if isinstance(document, dict) else ("", None)
        if method not in METHODS or not isinstance(points, list):
            known = ", ".join(METHODS)
            raise DataError(f"a calibrator must have a method of {known} and points, but got {shown(document)}")
        # 10**308 is a float, and 10**309 has none.
        are_numbers = all(type(point) in (int, float) and abs(point) < 10**308 for point in points)
        values = np.array(points if are_numbers else [np.nan], dtype=np.float64)
        half = len(values) // 2
        is_whole = {"none": half == 0, "platt": half == 1, "isotonic": half > 0}[method] and len(values) == 2 * half
        rises = method != "isotonic" or (is_whole and bool((np.diff(values.reshape(2, -1)) >= 0).all()))
        if not is_whole or not rises or not np.isfinite(values).all():
            raise DataError(f"the points of a calibrator must fit its method, {method}, but got {shown(points)}")
        return Calibrator(method, tuple(values.tolist()))


def apply_calibrators(detections: Detections, calibrators: Sequence[Calibrator]) -> Detections:
    """Detections with the scores that their classes' calibrators give. Raises DataError for scores outside [0, 1]."""
    check_scores(detections)
    score = np.asarray(detections.score, dtype=np.float64).copy()
    for k, calibrator in enumerate(calibrators):
        rows = detections.class_index == k
        score[rows] = calibrator(score[rows])
    return replace(detections, score=score)


def check_scores(detections: Detections) -> None:
    """Raises DataError unless all scores are in [0, 1]."""
    outside = np.flatnonzero(~((detections.score >= 0) & (detections.score <= 1)))
    if len(outside):
        raise DataError(
            f"scores must be in [0, 1] to be calibrated, but row {outside[0]} has {detections.score[outside[0]]:g}; "
            "scale them, or merge with calibration=none"
        )


@dataclass(frozen=True)
class ScoredDetections:
    """The evaluated detections of one class of one model: ``score [N]``, ``is_true [N]``, ``fold [N]``.

    ``is_true``: whether it is a true positive; ``fold``: that of its image. Detections of unverified classes and those
    that group-of boxes absorb are neither true nor false positives, and are left out.
    """

    score: FloatArray
    is_true: BoolArray
    fold: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: BoolArray) -> ScoredDetections:
        """The rows where ``rows [N]`` is True."""
        return ScoredDetections(self.score[rows], self.is_true[rows], self.fold[rows])


def fit(evaluated: ScoredDetections, method: Method) -> Calibrator:
    """The calibrator of one method; the scores themselves where nothing was evaluated."""
    return _FITS[method](evaluated) if len(evaluated) else Calibrator()


def choose_method(evaluated: ScoredDetections) -> Method:
    """The method of least held-out log loss, by leaving out one fold after the other; ``none`` with a single fold."""
    if len(np.unique(evaluated.fold)) < 2:
        return "none"
    losses = [held_out_loss(evaluated, method) for method in METHODS]
    return METHODS[int(np.argmin(losses))]


def held_out_loss(evaluated: ScoredDetections, method: Method) -> float:
    """Sum over the folds of the log loss of a fold's detections by the calibrator fitted on the other folds."""
    total = 0.0
    for fold in np.unique(evaluated.fold):
        inside = evaluated.fold == fold
        calibrated = fit(evaluated.take(~inside), method)(evaluated.score[inside])
        total += float(log_loss(calibrated, evaluated.is_true[inside]).sum())
    return total


def log_loss(probability: NDArray[np.floating], is_true: BoolArray) -> FloatArray:
    """Minus the log of the probability of the outcome, for each detection."""
    likelihood = np.where(is_true, probability, 1 - probability)
    return np.asarray(-np.log(np.clip(likelihood, _NEAR_ZERO, 1)), dtype=np.float64)


def _fit_platt(evaluated: ScoredDetections) -> Calibrator:
    num_true = int(evaluated.is_true.sum())
    target = np.where(evaluated.is_true, (num_true + 1) / (num_true + 2), 1 / (len(evaluated) - num_true + 2))
    x = _logit(evaluated.score)

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        z = weights[0] * x + weights[1]
        error = expit(z) - target
        return float((np.logaddexp(0, z) - target * z).mean()), np.array([(error * x).mean(), error.mean()])

    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(SMALLEST_SLOPE, None), (None, None)],
                     options={"ftol": 1e-14, "gtol": 1e-9})  # fmt: skip
    return Calibrator("platt", (float(found.x[0]), float(found.x[1])))


def _fit_isotonic(evaluated: ScoredDetections) -> Calibrator:
    scores, step = np.unique(evaluated.score, return_inverse=True)
    count = np.bincount(step).astype(np.float64)
    precision = np.bincount(step, evaluated.is_true) / count
    blocks = isotonic_regression(precision, weights=count).blocks
    weight = np.add.reduceat(count, blocks[:-1])
    centre = np.add.reduceat(count * scores, blocks[:-1]) / weight
    value = np.add.reduceat(count * precision, blocks[:-1]) / weight
    margin = 1 / (len(evaluated) + 2)
    return Calibrator("isotonic", (*centre.tolist(), *np.clip(value, margin, 1 - margin).tolist()))


def _logit(score: FloatArray) -> FloatArray:
    return np.asarray(logit(np.clip(score, _NEAR_ZERO, 1 - _NEAR_ZERO)), dtype=np.float64)


_FITS: dict[Method, Callable[[ScoredDetections], Calibrator]] = {
    "none": lambda evaluated: Calibrator(),
    "platt": _fit_platt,
    "isotonic": _fit_isotonic,
}
