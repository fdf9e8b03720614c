"""Bins, weights, plans and batches of Open Images at full size, and what each sampling strategy pays for balance.

    python benchmarks/open_images.py --metadata METADATA --output DIR --scale 1.0
    python benchmarks/index.py --data DIR --keep INDEX
    python benchmarks/sampling.py --index INDEX --sizes DIR/image-sizes.csv --figure docs/images/exposure_curves.png

Printed: wall and CPU seconds (the first grow with other work on the machine) and the most memory taken on top, by
tracemalloc, of counting images per class, of bins by each rule, of the weights and expected samples of each strategy,
of an epoch plan as long as there are images and of its batches; the exposure summary of all strategies at their
defaults; then, with the searchable settings turned, imbalance of samples per class (95th over 5th percentile) and
effective sample size of every setting. The figure shows these as curves: to the left is balance, up is variety. Counts
include the ancestors of the boxed classes, as a detector trained with ``parents=learn`` sees them.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from retinaflow.data.batching import AspectBuckets, plan_batches
from retinaflow.data.exposure import (
    compare_strategies,
    effective_sample_size,
    exposure_summary,
    exposure_table,
    imbalance,
)
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.id_columns import read_image_sizes
from retinaflow.data.image_class_pairs import ImageClassPairs, image_class_pairs
from retinaflow.data.image_sizes import SizeTable
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.sampling import STRATEGIES, epoch_plan, expected_samples, image_weights
from retinaflow.data.tables import RowErrors
from retinaflow.settings.data_settings import BinStrategy, SamplingSettings, Strategy

THRESHOLDS = (0.0003, 0.001, 0.003, 0.01, 0.1)
POWERS = (0.0, 0.15, 0.3, 0.5, 0.75)
BALANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.75, 0.9, 1.0)
EVERY_CLASS = 500
Result = TypeVar("Result")


class Point(NamedTuple):
    """One setting of one curve."""

    curve: str
    searchable: str
    imbalance: float
    ess: float


def main() -> None:
    arguments = parse()
    index = AnnotationIndex.open(arguments.index)
    pairs = timed("images per class", lambda: image_class_pairs(index, expand=True))
    for rule in get_args(BinStrategy):
        timed(f"bins, {rule}", partial(make_bins, pairs, strategy=rule))
    bins = make_bins(pairs)
    expected = np.zeros(0)
    for strategy in STRATEGIES:
        expected = timed(f"weights and expected samples, {strategy}", partial(draws, strategy, pairs, bins))
    plan = timed("epoch plan", lambda: epoch_plan(expected, seed=0, epoch=0))
    if arguments.sizes:
        sizes = SizeTable(*read_image_sizes(arguments.sizes, RowErrors())).look_up(index.image_ids)
        buckets = AspectBuckets.fit(sizes, image_size=512, num_buckets=7)
        bucket_of_image = timed("aspect bucket of every image", lambda: buckets.assign(sizes))
        timed("batches of the plan", lambda: plan_batches(plan, bucket_of_image, buckets, batch_size=8))
    exposures = timed(
        "exposure of all strategies",
        lambda: compare_strategies(pairs, bins, length=len(index), settings=SamplingSettings(), seed=0),
    )
    print(exposure_summary(exposures).to_string(index=False, float_format="%.3g"))
    if arguments.table:
        exposure_table(exposures, pairs, bins, index.taxonomy).to_csv(arguments.table, index=False)
    found = []
    for point in turned(pairs):
        print(f"{point.curve:<50} {point.searchable:<14} {point.imbalance:6.1f} {point.ess:6.3f}", flush=True)
        found.append(point)
    points = pd.DataFrame(found)
    if arguments.figure:
        figure_of(points).savefig(arguments.figure, dpi=110)


def timed(what: str, work: Callable[[], Result]) -> Result:
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    # A second time for the memory, as tracing slows down what makes many small objects.
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1] / 1e9
    tracemalloc.stop()
    print(f"{what:<52} {wall:6.2f} s  {cpu:6.2f} CPU s  {peak:5.2f} GB", flush=True)
    return result


def draws(
    strategy: Strategy, pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings | None = None
) -> np.ndarray:
    settings = settings or SamplingSettings()
    weights = image_weights(strategy, pairs, bins, settings)
    return expected_samples(weights, pairs.num_images, max_repeats=settings.max_repeats)


def turned(pairs: ImageClassPairs) -> Iterator[Point]:
    """Every strategy with its searchable setting turned."""
    seven = make_bins(pairs)

    def point(curve: str, searchable: str, strategy: Strategy, bins: ClassBins, settings: SamplingSettings) -> Point:
        expected = draws(strategy, pairs, bins, settings)
        return Point(curve, searchable, imbalance(expected, pairs), effective_sample_size(expected))

    yield point("uniform", "", "uniform", seven, SamplingSettings())
    for threshold in THRESHOLDS:
        searchable = SamplingSettings(repeat_threshold=threshold)
        yield point("repeat-factor", f"t={threshold:g}", "repeat-factor", seven, searchable)
        yield point("instance-repeat-factor", f"t={threshold:g}", "instance-repeat-factor", seven, searchable)
    for power in POWERS:
        yield point("class-aware", f"power={power:g}", "class-aware", seven, SamplingSettings(class_power=power))
    for count in (1, 3, 7, 14, EVERY_CLASS):
        bins = make_bins(pairs, num_bins=count)
        for balance in BALANCES if count > 1 else (0.75,):
            searchable = SamplingSettings(balance=balance, bin_rates="step")
            yield point(f"binned, {count} log bins", f"balance={balance:g}", "binned", bins, searchable)
    for cap in (100.0, 10.0):
        curve = "binned, 7 log bins, smooth" + ("" if cap == 100 else f", max_repeats={cap:g}")
        for balance in BALANCES:
            searchable = SamplingSettings(balance=balance, bin_rates="smooth", max_repeats=cap)
            yield point(curve, f"balance={balance:g}", "binned", seven, searchable)


STYLES = {
    "repeat-factor": ("#D55E00", "s", "-"),
    "instance-repeat-factor": ("#CC79A7", "D", "-"),
    "class-aware": ("#E69F00", "^", "-"),
    "binned, 3 log bins": ("#9ECAE1", "", ":"),
    "binned, 7 log bins": ("#56B4E9", "", "-."),
    "binned, 14 log bins": ("#0072B2", "", "--"),
    "binned, 7 log bins, smooth": ("#009E73", "o", "-"),
    "binned, 500 log bins": ("#000000", "", "-"),
}


def figure_of(points: pd.DataFrame) -> Figure:
    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(8.2, 5.2), layout="constrained")
        axes = figure.subplots()
        for curve, (color, marker, line) in STYLES.items():
            own = points[points["curve"] == curve].sort_values("imbalance")
            label = curve.replace("500 log bins", "a rate for every class")
            axes.plot(
                own["imbalance"], own["ess"], color=color, marker=marker, linestyle=line, markersize=5, label=label
            )
        uniform = points[points["curve"] == "uniform"].iloc[0]
        axes.plot(uniform["imbalance"], uniform["ess"], marker="*", markersize=13, color="#7F7F7F", linestyle="none")
        axes.annotate(
            "uniform,\nbinned with 1 bin",
            (uniform["imbalance"], uniform["ess"]),
            xytext=(8, -12),
            textcoords="offset points",
            ha="right",
            va="top",
        )
        axes.set(
            xscale="log",
            ylim=(0, 1.05),
            xlabel="imbalance of samples per class (95th over 5th percentile)",
            ylabel="effective sample size (fraction of the images)",
            title="Open Images Challenge at full size: balance (left) against variety (up)",
        )
        axes.set_xticks([10, 20, 50, 100, 200], labels=["10", "20", "50", "100", "200"])
        axes.minorticks_off()
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(loc="lower right", frameon=False)
    return figure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="index kept by index.py")
    parser.add_argument("--sizes", type=Path, help="table of image sizes written by open_images.py, for batches")
    parser.add_argument("--table", type=Path, help="CSV file for the exposure of every class")
    parser.add_argument("--figure", type=Path, help="PNG file for the curves")
    return parser.parse_args()


if __name__ == "__main__":
    main()
