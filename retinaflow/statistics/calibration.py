"""Scores that mean the same in every class: from "0.7" to the share of such detections that are right.

A detector's scores are not probabilities, and those of two detectors are on two scales. A :class:`Calibrator` maps the
scores of one class of one detector by a rising function, fitted to detections that the Challenge's matching has evaluated:

- ``platt``: sigmoid(a * logit(score) + b), a > 0, by maximum likelihood with Platt's targets (N+ + 1) / (N+ + 2) for
  right and 1 / (N- + 2) for wrong detections (Platt 1999, section 2.2);
- ``isotonic``: the rising step function of least squares (pool adjacent violators; Zadrozny and Elkan 2002), linear
  between the centres of its steps, held within 1 / (N + 2) of 0 and 1;
- ``none``: the score itself.

Which of them is told by the likelihood of detections on images that had no part in the fit (:func:`choose_method`). A
millionth of the score itself is mixed in, so that every calibrator rises strictly: the order of one class's detections
from one model, and with it the class's AP, stays as it was.

Cost of a fit: linear in the evaluated detections (isotonic: after a sort).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Method = Literal["none", "platt", "isotonic"]
METHODS: tuple[Method, ...] = ("none", "platt", "isotonic")
"""In the order in which a draw is settled: the simplest wins."""

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
            share = expit(slope * _logit(raw) + intercept)
        else:
            half = len(self.points) // 2
            share = np.interp(raw, self.points[:half], self.points[half:])
        return np.asarray((1 - TIE_BREAK) * share + TIE_BREAK * raw, dtype=np.float64)

    def to_document(self) -> dict[str, Any]:
        """JSON values that :meth:`from_document` reads."""
        return {"method": self.method, "points": list(self.points)}

    @staticmethod
    def from_document(document: dict[str, Any]) -> Calibrator:
        """What :meth:`to_document` described. Raises ValueError for anything else."""
        method, points = document.get("method"), document.get("points")
        if method not in METHODS or not isinstance(points, list):
            raise ValueError(f"a calibrator must have a method of {', '.join(METHODS)} and points, but got {document}")
        return Calibrator(method, tuple(float(point) for point in points))


@dataclass(frozen=True)
class ScoredDetections:
    """The evaluated detections of one class of one model: ``score [N]``, ``right [N]``, ``fold [N]`` of their image.

    Detections of unverified classes and those that group-of boxes absorb are neither right nor wrong, and not here.
    """

    score: FloatArray
    right: BoolArray
    fold: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: BoolArray) -> ScoredDetections:
        """The rows where ``rows [N]`` is True."""
        return ScoredDetections(self.score[rows], self.right[rows], self.fold[rows])


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
        total += float(log_loss(calibrated, evaluated.right[inside]).sum())
    return total


def log_loss(share: NDArray[np.floating], right: BoolArray) -> FloatArray:
    """Minus the log of what was said of the outcome, for each detection."""
    said = np.where(right, share, 1 - share)
    return np.asarray(-np.log(np.clip(said, _NEAR_ZERO, 1)), dtype=np.float64)


def _fit_platt(evaluated: ScoredDetections) -> Calibrator:
    right = int(evaluated.right.sum())
    target = np.where(evaluated.right, (right + 1) / (right + 2), 1 / (len(evaluated) - right + 2))
    x = _logit(evaluated.score)

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        z = weights[0] * x + weights[1]
        error = expit(z) - target
        return float((np.logaddexp(0, z) - target * z).mean()), np.array([(error * x).mean(), error.mean()])

    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(SMALLEST_SLOPE, None), (None, None)],
                     options={"ftol": 1e-14, "gtol": 1e-9})  # fmt: skip
    return Calibrator("platt", (float(found.x[0]), float(found.x[1])))


def _fit_isotonic(evaluated: ScoredDetections) -> Calibrator:
    scores, place = np.unique(evaluated.score, return_inverse=True)
    count = np.bincount(place).astype(np.float64)
    share = np.bincount(place, evaluated.right) / count
    blocks = isotonic_regression(share, weights=count).blocks
    weight = np.add.reduceat(count, blocks[:-1])
    centre = np.add.reduceat(count * scores, blocks[:-1]) / weight
    value = np.add.reduceat(count * share, blocks[:-1]) / weight
    margin = 1 / (len(evaluated) + 2)
    return Calibrator("isotonic", (*centre.tolist(), *np.clip(value, margin, 1 - margin).tolist()))


def _logit(score: FloatArray) -> FloatArray:
    return np.asarray(logit(np.clip(score, _NEAR_ZERO, 1 - _NEAR_ZERO)), dtype=np.float64)


_FITS: dict[Method, Callable[[ScoredDetections], Calibrator]] = {
    "none": lambda evaluated: Calibrator(),
    "platt": _fit_platt,
    "isotonic": _fit_isotonic,
}
