"""People who stand close: which way to suppress overlapping boxes finds most of them, and at what price.

    python benchmarks/overlapping_boxes.py --output outputs/overlapping
    python benchmarks/overlapping_boxes.py --train_on demo
    python benchmarks/overlapping_boxes.py --from_run outputs/RUN/checkpoints/best.pt

The demo set's people overlap little, so a crowded variant of it is drawn (``crowd`` of
:func:`retinaflow.demo.dataset.write_demo`). A detector (``--from_run``, or one trained here, on the crowded variant or on
the demo set, for ``--epochs``) is run over its validation images once; every way is then asked about the same raw
boxes. Half of the images (tune) is there to choose the settings by, the other half (report) to say what they are worth.

For people-clothing, Person alone and rest: AP, AP of crowded objects (those that overlap another of their class by
IoU > 0.3), recall of all and of crowded ones at 0.1 false positives per image and class, each a mean over classes;
doubles per image among those (detections of an object that is found already), a sum. With the 95% intervals of the
paired differences in AP to the first way, and milliseconds of CPU time per image for thinning out alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from retinaflow.inference.postprocess_settings import postprocess_config

from retinaflow.boxes import iou
from retinaflow.data.class_groups import select_classes
from retinaflow.data.dataset import BatchLoader, DetectionDataset
from retinaflow.data.images import decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import read_split
from retinaflow.demo.dataset import demo_is_current, write_demo
from retinaflow.detections import Detections
from retinaflow.detector.postprocess import BatchDetections, PostprocessConfig, candidates, suppressed
from retinaflow.inference.batches import _batches
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.metric.candidate_matches import GroundTruthByPair
from retinaflow.metric.challenge import Evaluator, average_precision
from retinaflow.metric.matches import Kind, Matches
from retinaflow.metric.slices import subsets
from retinaflow.reports.contact_sheet import Panel, contact_sheet
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import PROFILES, resolve
from retinaflow.statistics.bootstrap import paired_differences

FALSE_POSITIVES = 0.1
"""Per image and class: where recall and doubles are read off."""
RESAMPLES = 200
SHOWN_SCORE = 0.3
LEARNT = "learnt"
"""Plain NMS with the threshold of each class from the pairs of training: :func:`learnt_thresholds`."""
WAYS = (
    *("nms", "nms:0.4", "nms:0.55", "nms:0.6", "nms:0.7", LEARNT),
    *("soft-nms:0.1", "soft-nms:0.3", "soft-nms:0.5"),
    *("support-nms:0.5", "support-nms", "support-nms:2"),
)


@dataclass(frozen=True)
class RawImage:
    """Candidates of one image, boxes in pixels, and the image's (height, width)."""

    image: int
    found: BatchDetections
    size: tuple[int, int]


@dataclass(frozen=True)
class ScoredDetections:
    """One way on one half of the images; arrays ``[K]``, NaN without ground truth."""

    matches: Matches
    crowded: Matches
    columns: Mapping[str, NDArray[np.float64]]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    folder = crowded_set(arguments)
    checkpoint = load_checkpoint(arguments.from_run or trained(arguments, folder))
    ground_truth = read_ground_truth(folder, "validation", checkpoint, arguments.images)
    raw = raw_boxes(checkpoint, ground_truth, arguments.output / "raw.pt")
    halves = {"tune": np.arange(0, len(ground_truth), 2), "report": np.arange(1, len(ground_truth), 2)}
    groups = {name: members(name, ground_truth) for name in ("people-clothing", "Person", "rest")}
    print(overlap_table(ground_truth, groups))
    learnt = learnt_thresholds(read_ground_truth(folder, "train", checkpoint))
    rows: list[dict[str, object]] = []
    base: dict[str, ScoredDetections] = {}
    kept: dict[str, Detections] = {}
    for name in arguments.ways.split(",") if arguments.ways else WAYS:
        config = (
            PostprocessConfig(score_threshold=0.02, nms_iou=learnt)
            if name == LEARNT
            else postprocess_config(
                nms=name, nms_iou=0.5, score_threshold=0.02, max_detections=300, taxonomy=checkpoint.taxonomy
            )
        )
        found, milliseconds = thinned(raw, config, checkpoint)
        for half, images in halves.items():
            evaluated = score_detections(ground_truth.take(images), of_images(found, images, len(ground_truth)))
            first = base.setdefault(half, evaluated)
            rows += [{"half": half, **row} for row in table_rows(name, evaluated, first, groups, milliseconds)]
        # After each way: a table that is looked at while the rest is still being worked on.
        frame = pd.DataFrame(rows).sort_values(["half", "group"], kind="stable")
        frame.to_csv(arguments.output / "overlapping_boxes.csv", index=False)
        print(name, flush=True)
        kept[name] = found
    print(markdown(frame))
    if arguments.picture:
        ways = {name: kept[name] for name in arguments.picture_ways.split(",")}
        picture(ground_truth, ways, halves["report"], name="Person").savefig(arguments.picture)


def crowded_set(arguments: argparse.Namespace) -> Path:
    """The crowded variant of the demo set, drawn on first use."""
    folder: Path = arguments.output / "crowd"
    sizes = {"train_images": 1200, "validation_images": 800, "crowd": arguments.crowd}
    if not demo_is_current(folder, **sizes):
        write_demo(folder, **sizes, progress=sys.stderr.isatty())
    return folder


def trained(arguments: argparse.Namespace, crowd: Path) -> Path:
    """The checkpoint of a training with the demo set's settings, in a process of its own; a finished one is kept."""
    folder = arguments.output / f"trained_on_{arguments.train_on}"
    best: Path = folder / "train" / "checkpoints" / "best.pt"
    if not (folder / "train" / "metrics.json").is_file():
        data = "demo" if arguments.train_on == "demo" else str(crowd)
        settings = {**PROFILES["demo"], "data": data, "epochs": arguments.epochs, "eval_every": arguments.epochs}
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "retinaflow", "train", "--track", "false", "--output", str(folder)]
        subprocess.run([*command, *flags], check=True)
    return best


def read_ground_truth(folder: Path, split: str, checkpoint: Checkpoint, images: int | None = None) -> AnnotationIndex:
    """The first images of a split, with the classes of the model."""
    index = read_split(resolve(TrainConfig, {"data": str(folder)}), [split], boxes=(), image_labels=()).index
    index = index.with_classes(np.array([index.taxonomy.index_of[mid] for mid in checkpoint.taxonomy.ids]))
    return index.take(np.arange(min(images or len(index), len(index))))


def members(group: str, ground_truth: AnnotationIndex) -> NDArray[np.bool_]:
    chosen = np.zeros(ground_truth.num_classes, dtype=bool)
    chosen[select_classes(group, ground_truth.taxonomy)] = True
    return chosen


def raw_boxes(checkpoint: Checkpoint, ground_truth: AnnotationIndex, path: Path) -> list[RawImage]:
    """Candidates of every image; kept in ``path``, and read from there by the next call for the same model."""
    key = [checkpoint.data_digest, checkpoint.epoch, ground_truth.digest, len(ground_truth)]
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key:
            return [RawImage(image, BatchDetections(*columns), tuple(size)) for image, columns, size in kept["images"]]
    model = checkpoint.build(torch.device("cpu"))
    config = PostprocessConfig(score_threshold=0.02)
    raw = []
    for batch in BatchLoader(DetectionDataset(ground_truth)).load(list(_batches(ground_truth, checkpoint.buckets, 16))):
        grid = model.anchors((batch.images.shape[2], batch.images.shape[3]))
        with torch.inference_mode():
            found = candidates(model(batch.images), grid, config=config)
        for place, image in enumerate(batch.image_index.tolist()):
            own = found.take(found.owner == place)
            raw.append(RawImage(image, own, grid.image_size))
    columns = [(one.image, tuple(vars(one.found).values()), one.size) for one in raw]
    torch.save({"key": key, "images": columns}, path)
    return raw


def thinned(raw: list[RawImage], config: PostprocessConfig, checkpoint: Checkpoint) -> tuple[Detections, float]:
    """Detections of all images, and milliseconds per image."""
    parts, seconds = [], 0.0
    for one in raw:
        start = time.thread_time()
        found = suppressed(one.found, len(checkpoint.taxonomy), config)
        seconds += time.thread_time() - start
        best = found.take(found.score.argsort(descending=True, stable=True)[: config.max_detections])
        boxes = best.boxes.numpy() / np.array([one.size[1], one.size[0]] * 2)
        image = np.full(len(best), one.image, dtype=np.int32)
        parts.append(Detections(image, best.label.numpy().astype(np.int32), best.score.numpy(), boxes))
    return Detections.concatenate(parts), seconds / len(raw) * 1000


def of_images(found: Detections, images: NDArray[np.int64], count: int) -> Detections:
    """The detections of some images, counted anew."""
    place = np.full(count, -1, dtype=np.int32)
    place[images] = np.arange(len(images))
    kept = found.take(place[found.image_index] >= 0)
    return Detections(place[kept.image_index], kept.class_index, kept.score, kept.boxes)


def learnt_thresholds(ground_truth: AnnotationIndex) -> torch.Tensor:
    """``[K]``: the IoU that 99% of the ground-truth boxes of a class stay below with any other of their class, in 0.5 to 0.7.

    By the IoU of true pairs in training (crowded classes overlap, others do not), in steps of 0.05.
    """
    pairs = GroundTruthByPair(ground_truth, np.ones(ground_truth.num_classes, dtype=bool))
    most = np.zeros(len(pairs.ordinary))
    for begin, end in zip(pairs.ordinary_start[:-1], pairs.ordinary_start[1:], strict=True):
        boxes = pairs.ordinary.boxes[begin:end]
        most[begin:end] = np.where(np.eye(len(boxes), dtype=bool), 0, iou(boxes, boxes)).max(axis=1, initial=0)
    label = pairs.ordinary.pair % ground_truth.num_classes
    high = [np.quantile(most[label == k], 0.99) if (label == k).any() else 0.0 for k in range(ground_truth.num_classes)]
    return torch.from_numpy(np.clip(np.ceil(np.array(high) * 20 - 1e-9) / 20, 0.5, 0.7))


def overlap_table(ground_truth: AnnotationIndex, groups: Mapping[str, NDArray[np.bool_]]) -> str:
    """How many ground-truth boxes overlap another one of their class."""
    evaluator = Evaluator(ground_truth)
    crowded = subsets(evaluator)["crowded"].ground_truths
    label = evaluator.ground_truth.ordinary.pair % ground_truth.num_classes
    counts = {name: (int((chosen[label] & crowded).sum()), int(chosen[label].sum())) for name, chosen in groups.items()}
    return "; ".join(f"{name}: {few} of {all_} ground-truth boxes are crowded" for name, (few, all_) in counts.items())


def score_detections(ground_truth: AnnotationIndex, found: Detections) -> ScoredDetections:
    evaluator = Evaluator(ground_truth)
    evaluator.add(found)
    num_classes, crowded = ground_truth.num_classes, subsets(evaluator)["crowded"]
    matches = evaluator.matches(group_of_weight=0.0)
    in_crowd = evaluator.matches(group_of_weight=0.0, subset=crowded)
    floor = score_floor(matches, FALSE_POSITIVES * len(ground_truth))
    claims = evaluator.ranked_candidates()
    claimants = np.flatnonzero(claims.iou >= 0.5)
    first = claimants[np.unique(claims.nearest[claimants], return_index=True)[1]]
    label = evaluator.ground_truth.pairs[claims.slot] % num_classes
    double = (claims.iou >= 0.5) & (claims.score >= floor[label])
    double[first] = False
    columns = {
        "AP": average_precision(matches),
        "crowded AP": average_precision(in_crowd),
        "recall": recall(matches, floor),
        "crowded recall": recall(in_crowd, floor),
        "doubles": np.bincount(label[double], minlength=num_classes) / len(ground_truth),
    }
    return ScoredDetections(matches, in_crowd, columns)


def score_floor(matches: Matches, most: float) -> NDArray[np.float64]:
    """``[K]``: the lowest score down to which a class has at most ``most`` false positives."""
    floor = np.full(len(matches.evaluated), np.inf)
    for label in np.unique(matches.class_index):
        rows = matches.class_index == label
        fine = np.cumsum(matches.kind[rows] == Kind.FALSE_POSITIVE) <= most
        floor[label] = matches.score[rows][fine].min(initial=np.inf)
    return floor


def recall(matches: Matches, floor: NDArray[np.float64]) -> NDArray[np.float64]:
    right = (matches.kind == Kind.TRUE_POSITIVE) & (matches.score >= floor[matches.class_index])
    found = np.bincount(matches.class_index[right], minlength=len(floor))
    ground_truths = matches.num_truths
    return np.divide(found, ground_truths, out=np.full(len(floor), np.nan), where=ground_truths > 0)


def table_rows(
    name: str,
    evaluated: ScoredDetections,
    base: ScoredDetections,
    groups: Mapping[str, NDArray[np.bool_]],
    milliseconds: float,
) -> list[dict[str, object]]:
    of_all = paired_differences(base.matches, evaluated.matches, groups=groups, resamples=RESAMPLES).groups
    of_crowded = paired_differences(base.crowded, evaluated.crowded, groups=groups, resamples=RESAMPLES).groups
    rows = []
    for group, chosen in groups.items():
        row: dict[str, object] = {"group": group, "way": name}
        for column, values in evaluated.columns.items():
            known = values[chosen & np.isfinite(values)]
            value = known.sum() if column == "doubles" else known.mean() if len(known) else np.nan
            row[column] = round(float(value), 3)
        for column, gap in (("AP - first", of_all[group]), ("crowded AP - first", of_crowded[group])):
            row[column] = f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        row["ms"] = round(milliseconds, 1)
        rows.append(row)
    return rows


def markdown(frame: pd.DataFrame) -> str:
    values = [["" if pd.isna(value) else str(value) for value in row] for row in frame.to_numpy().tolist()]
    rows = [list(frame), ["---"] * len(frame.columns), *values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def picture(
    ground_truth: AnnotationIndex,
    found: Mapping[str, Detections],
    images: NDArray[np.int64],
    *,
    name: str,
    rows: int = 3,
) -> Figure:
    """One class of the images on which two ways differ most, a row each, a column per way."""
    label, ways = ground_truth.taxonomy.find(name), list(found)
    shown = {way: one.take((one.class_index == label) & (one.score > SHOWN_SCORE)) for way, one in found.items()}
    counts = np.array([np.bincount(one.image_index, minlength=len(ground_truth))[images] for one in shown.values()])
    chosen = images[np.argsort(-np.ptp(counts, axis=0), kind="stable")[:rows]]
    panels = [panel(ground_truth, shown[way], int(image), label=label, title=way) for image in chosen for way in ways]
    return contact_sheet(panels, columns=len(ways), title=f"{name}: ground truth and detections above {SHOWN_SCORE}")


def panel(ground_truth: AnnotationIndex, found: Detections, image: int, *, label: int, title: str) -> Panel:
    height, width = (int(side) for side in ground_truth.sizes[image])
    own = found.take(found.image_index == image)
    boxes = GroundTruthByPair(ground_truth, np.ones(ground_truth.num_classes, dtype=bool)).ordinary
    at = boxes.pair == image * ground_truth.num_classes + label
    return Panel(
        image=decode(ground_truth.file_of(image), (height, width), (height, width)),
        title=title,
        gt_boxes=boxes.boxes[at],
        gt_labels=[""] * int(at.sum()),
        detection_boxes=own.boxes,
        detection_labels=[""] * len(own),
        detection_scores=own.score,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from_run", type=Path, help="checkpoint of a training on the demo set or its crowded variant")
    parser.add_argument("--train_on", choices=("crowd", "demo"), default="crowd", help="without --from_run")
    parser.add_argument("--epochs", type=int, default=6, help="of the training, without --from_run")
    parser.add_argument("--crowd", type=float, default=0.5, help="share of the pictures with people who stand close")
    parser.add_argument("--images", type=int, default=800, help="validation images, half of them reported")
    parser.add_argument(
        "--ways", default="", help="as the setting nms has them, or learned, by commas; the first is compared with"
    )
    parser.add_argument("--picture", type=Path, help="file to draw the people on which two ways differ most to")
    parser.add_argument("--picture_ways", default="nms,soft-nms:0.5,support-nms", help="its columns")
    parser.add_argument("--output", type=Path, default=Path("outputs/overlapping"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
