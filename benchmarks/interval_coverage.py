"""How often 95% intervals cover the true AP, ours beside percentiles of a bootstrap with replacement.

    python benchmarks/interval_coverage.py --samples 300 --copies 1

Samples are drawn from the population of ``tests/simulated_population.py``, whose AP is known. Prints, in
percent, how often it is covered: for classes by how many images of a sample hold them (mean of the four qualities), for
bins (means of the classes of one size) and for the mean of all classes; then the same for paired differences. Below
each row stands the mean width.
``--copies 5`` has five classes of each kind: the more classes, the narrower the interval of their mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from simulated_population import IMAGES, IMAGES_WITH_CLASS, QUALITIES, draw_runs, true_ap

from retinaflow.statistics.bootstrap import bootstrap_intervals, paired_differences
from retinaflow.statistics.resampling import resampled_ap

Ends = dict[str, tuple[np.ndarray, np.ndarray]]


def main() -> None:
    arguments = parse()
    ground_truth = true_ap(num_images=200_000)
    size = len(IMAGES_WITH_CLASS)
    num_classes = arguments.copies * size * len(QUALITIES)
    size_of_class = np.arange(num_classes) // len(QUALITIES) % size
    rows = np.arange(num_classes)[:, None]
    groups = {f"bin {count}": size_of_class == k for k, count in enumerate(IMAGES_WITH_CLASS)}
    groups["mean"] = np.ones(num_classes, dtype=bool)
    found: dict[str, list[np.ndarray]] = {}
    for sample in range(arguments.samples):
        runs = draw_runs(np.random.default_rng([1, sample]), IMAGES, copies=arguments.copies)
        present = runs[0].num_truths > 0
        first = ground_truth[0][rows[:, 0] % len(QUALITIES)]
        second = ground_truth[1][rows[:, 0] % len(QUALITIES)]
        for what, values in (("score", first), ("difference", second - first)):
            aim = np.array([*np.where(present, values, np.nan), *_means(values, present, groups)])
            for method, (low, high) in _ends(what, runs, groups, arguments.resamples, sample).items():
                covered = np.where(np.isnan(aim), np.nan, (low - 1e-12 <= aim) & (aim <= high + 1e-12))
                found.setdefault(f"{what}, {method}", []).append(np.stack([covered, high - low]))
    print(f"{'':<24}" + "".join(f"{f'{count}':>7}" for count in IMAGES_WITH_CLASS), end="   |")
    print("".join(f"{name:>9}" for name in groups))
    for name, values in found.items():
        for number, (label, scale) in enumerate((("covered %", 100.0), ("width", 1.0))):
            mean = scale * np.nanmean(np.stack(values)[:, number], axis=0)
            by_size = [mean[:num_classes][size_of_class == k].mean() for k in range(size)]
            digits = 0 if scale > 1 else 3
            print(f"{name if not number else label:<24}" + "".join(f"{v:7.{digits}f}" for v in by_size), end="   |")
            print("".join(f"{v:9.{digits}f}" for v in mean[num_classes:]))


def _ends(what: str, runs: tuple, groups: dict[str, np.ndarray], resamples: int, seed: int) -> Ends:
    """Method -> both ends for the classes and then the groups."""
    settings = {"groups": groups, "resamples": resamples, "seed": seed, "threads": 1}
    draws = resampled_ap(runs, resamples=resamples, seed=seed, threads=1, sample=_with_replacement)
    if what == "score":
        ours, drawn = bootstrap_intervals(runs[0], **settings), draws[0]
    else:
        ours, drawn = paired_differences(*runs, **settings), draws[1] - draws[0]
    both = []
    for low_or_high in ("low", "high"):
        of_groups = [getattr(value, low_or_high) for value in ours.groups.values()]
        both.append(np.array([*getattr(ours, f"ap_{low_or_high}"), *of_groups]))
    known = ~np.isnan(drawn)
    means = [
        np.where(known[:, g], drawn[:, g], 0).sum(axis=1) / np.maximum(known[:, g].sum(axis=1), 1)
        for g in groups.values()
    ]
    columns = np.column_stack([drawn, *means])
    columns[:, np.isnan(columns).all(axis=0)] = -9
    low, high = np.nanpercentile(columns, [2.5, 97.5], axis=0)
    return {"ours": (both[0], both[1]), "percentiles": (low, high)}


def _means(values: np.ndarray, present: np.ndarray, groups: dict[str, np.ndarray]) -> list[float]:
    return [values[g & present].mean() if (g & present).any() else float("nan") for g in groups.values()]


def _with_replacement(num_images: int, resample: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, resample])
    return np.bincount(rng.integers(num_images, size=num_images), minlength=num_images).astype(np.float64)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=400)
    return parser.parse_args()


if __name__ == "__main__":
    main()
