"""Intervals over 40,000 images and 500 classes beside a plain loop that asks the metric again for every resample.

    python benchmarks/bootstrap.py --threads 2

A made case by seed: long-tailed classes, 300,000 ground-truth boxes, 2,000,000 entries of precision-recall curves.
Prints wall clock and CPU seconds and the peak of resident memory of ``bootstrap_intervals`` (1,000 resamples), the CPU
seconds of the loop (``average_precision`` with image weights, ``--plain`` resamples, scaled to as many), and the
largest difference of the two for the same resamples. On a busy machine compare CPU seconds.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from retinaflow.metric.challenge import average_precision
from retinaflow.metric.matches import Dropped, Kind, Matches
from retinaflow.statistics.bootstrap import bootstrap_intervals
from retinaflow.statistics.resampling import half_of_images, resampled_ap


def main() -> None:
    arguments = parse()
    matches = made_matches(arguments.images, arguments.classes, arguments.ground_truths, arguments.entries)
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    found = bootstrap_intervals(matches, resamples=arguments.resamples, threads=arguments.threads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{arguments.images} images, {arguments.classes} classes, {len(matches.score)} entries")
    print(f"retinaflow  {arguments.resamples} resamples, {arguments.threads} threads: {wall:.1f} s, {cpu:.1f} s of CPU")
    print(
        f"            peak memory {before:.0f} -> {peak():.0f} MiB, mAP {found.mean.low:.4f} to {found.mean.high:.4f}"
    )
    images = arguments.images
    times = [half_of_images(images, resample, seed=0).astype(np.int64) for resample in range(arguments.plain)]
    cpu = time.process_time()
    plain = np.stack([average_precision(matches, image_weights=counts) for counts in times])
    cpu = time.process_time() - cpu
    scaled = cpu / arguments.plain * arguments.resamples
    print(f"plain loop  {arguments.plain} resamples: {cpu:.1f} s of CPU, so {scaled:.0f} s for {arguments.resamples}")
    (fast,) = resampled_ap([matches], resamples=arguments.plain, seed=0, threads=arguments.threads)
    print(f"largest difference {np.nanmax(np.abs(fast - plain)):.1e}")


def made_matches(num_images: int, num_classes: int, num_truths: int, num_entries: int) -> Matches:
    """Matches as a fair detector makes them, without boxes."""
    rng = np.random.default_rng(0)
    share = np.arange(1, num_classes + 1) ** -1.1
    share /= share.sum()
    gt_class, gt_image = rng.choice(num_classes, num_truths, p=share), rng.integers(num_images, size=num_truths)
    found = rng.random(num_truths) < 0.7
    right, wrong = int(found.sum()), num_entries - int(found.sum())
    class_index = np.concatenate([gt_class[found], rng.choice(num_classes, wrong, p=share)])
    image_index = np.concatenate([gt_image[found], rng.integers(num_images, size=wrong)])
    score = np.concatenate([rng.beta(3, 2, right), rng.beta(1, 4, wrong)])
    kind = np.repeat([int(Kind.TRUE_POSITIVE), int(Kind.FALSE_POSITIVE)], [right, wrong]).astype(np.int8)
    order = np.lexsort((-score, class_index))
    pair, count = np.unique(gt_class * num_images + gt_image, return_counts=True)
    return Matches(
        image_index=image_index[order],
        class_index=class_index[order],
        score=score[order],
        kind=kind[order],
        weight=np.ones(num_entries),
        detection_row=order,
        gt_image=pair % num_images,
        gt_class=pair // num_images,
        gt_count=count.astype(np.float64),
        image_ids=np.array([f"{image:08d}" for image in range(num_images)]),
        evaluated=np.ones(num_classes, dtype=bool),
        dropped=Dropped(0, 0, 0, 0, 0),
        absorbed=0,
        verified_labels=0,
        repeated_ground_truths=0,
        iou_threshold=0.5,
        group_of_weight=1.0,
    )


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--truths", type=int, default=300_000)
    parser.add_argument("--entries", type=int, default=2_000_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--plain", type=int, default=5, help="resamples of the plain loop")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
