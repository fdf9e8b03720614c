"""The reliability diagram: the precision of the detections with a score near s."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.reports.figure_style import OKABE_ITO, class_figure, legend

STEPS = 10


def reliability(before: NDArray[np.floating], after: NDArray[np.floating], is_true: NDArray[np.bool_]) -> Figure:
    """Precision in tenths of the score, before and after calibration; calibrated scores lie on the diagonal.

    ``before [N]``, ``after [N]`` in [0, 1], ``is_true [N]``: whether a true positive. The area of a dot follows the
    number of its detections.
    """
    figure, axes = class_figure("Precision by score, all models and classes", right=0.78)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision")
    axes.plot([0, 1], [0, 1], color="#7F7F7F", linewidth=1, linestyle="--")
    handles = [
        _curve(axes, score, is_true, color, label)
        for score, color, label in ((before, OKABE_ITO[1], "as detected"), (after, OKABE_ITO[0], "calibrated"))
    ]
    legend(axes, handles, f"{len(is_true):,} evaluated detections")
    return figure


def _curve(axes: Axes, score: NDArray[np.floating], is_true: NDArray[np.bool_], color: str, label: str) -> object:
    step = np.clip((np.asarray(score) * STEPS).astype(np.int64), 0, STEPS - 1)
    count = np.bincount(step, minlength=STEPS)
    filled = count > 0
    mean = np.bincount(step, score, STEPS)[filled] / count[filled]
    precision = np.bincount(step, is_true, STEPS)[filled] / count[filled]
    axes.scatter(
        mean, precision, s=20 + 280 * count[filled] / max(count.max(), 1), color=color, alpha=0.45, linewidth=0
    )
    (line,) = axes.plot(mean, precision, color=color, marker="o", markersize=4, label=label)
    return line
