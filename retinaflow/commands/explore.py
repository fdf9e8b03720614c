"""``explore``: one page about the data before anything is trained on it, ``explore.html``, and its pictures."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.data import exploration
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.bins import ClassBins, make_bins
from retinaflow.data.class_groups import limit_background, select_classes
from retinaflow.data.image_class_pairs import ImageClassPairs, image_class_pairs
from retinaflow.data.images import UnreadableImageError, decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.suspicious import suspicions, suspicious_table
from retinaflow.data.training_data import read_split
from retinaflow.progress import report
from retinaflow.reports import data_figures
from retinaflow.reports.contact_sheet import Panel, contact_sheet
from retinaflow.reports.figures import class_frequency
from retinaflow.reports.page import Page, Report
from retinaflow.runs.run import FolderRun
from retinaflow.runs.tracking import start_run
from retinaflow.settings.commands import ExploreConfig
from retinaflow.training.anchor_fit import BoxSample, advice, class_reach, reach_of_settings

PAGE = "explore.html"
HEAT_MAP_CLASSES = 20
SHOWN_ROWS = 8
"""Suspicious rows of each rule on the page."""
LISTED_ROWS = 10_000
"""Suspicious rows of each rule in ``suspicious.csv``."""
_SHEET_PIXELS = 360


@dataclass(frozen=True)
class Explored:
    """The data that is looked at. ``given`` counts boxes as published; ``bins`` as a training would."""

    index: AnnotationIndex
    given: ImageClassPairs
    bins: ClassBins
    table: pd.DataFrame
    dropped: pd.DataFrame

    @property
    def has_sizes(self) -> bool:
        """Whether the sizes of the images are known."""
        return bool((np.asarray(self.index.sizes) > 0).all())

    def names(self, classes: NDArray[np.integer]) -> list[str]:
        """Names of classes for people."""
        return [self.index.taxonomy.labels[k] for k in classes]


def run(config: ExploreConfig) -> Path:
    """Read the annotations, write the page. Returns its path."""
    data = _load(config)
    with start_run("explore", track=config.track, experiment=config.experiment, output=config.output) as run:
        run.log_params(config.model_dump())
        folder = FolderRun(config.output)
        splits = ", ".join(config.train_splits)
        page = Page("What is in the data", f"{config.data}: {splits}; classes: {config.class_group}")
        written = Report(page, [run, folder] if config.track else [run])
        suspicious = _write(written, data, config)
        run.log_metrics(_metrics(data, suspicious), step=0)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / PAGE
            path.write_text(page.html(), encoding="utf-8")
            for target in written.targets:
                target.log_file(path)
    report(f"report: {config.output / PAGE}")
    return config.output / PAGE


def _load(config: ExploreConfig) -> Explored:
    labels = None if config.image_labels == "none" else config.image_labels
    with_images = config.samples > 0
    loaded = read_split(
        config, config.train_splits, boxes=config.boxes, image_labels=labels, with_images=with_images, fill_in=False
    )
    index = loaded.index

    def bins_of(index: AnnotationIndex) -> ClassBins:
        pairs = image_class_pairs(index, expand=True)
        return make_bins(pairs, num_bins=config.num_bins, strategy=config.bin_strategy)

    if config.class_group != "all":
        index = index.with_classes(select_classes(config.class_group, index.taxonomy, bins_of(index)))
        index, *_ = limit_background(index, ratio=config.background_ratio, seed=config.seed)
    given, bins = image_class_pairs(index), bins_of(index)
    table = exploration.class_table(index, given, bins)
    return Explored(index, given, bins, table, loaded.dropped)


def _write(written: Report, data: Explored, config: ExploreConfig) -> pd.DataFrame:
    """All sections in order, a line each, as some take a minute on millions of images. Returns the suspicious rows per
    rule."""
    _overview(written, data)
    report("classes and bins")
    _classes(written, data)
    report("boxes, sizes and shapes")
    _boxes(written, data, config)
    report("classes together")
    _together(written, data)
    report("image-level labels")
    _labels(written, data)
    report("suspicious rows")
    suspicious = _suspicious(written, data)
    if config.samples > 0:
        report("images of the rarest classes")
        _samples(written, data, config.samples)
    return suspicious


def _overview(written: Report, data: Explored) -> None:
    index, empty = data.index, len(data.bins.empty_classes)
    written.page.figures(
        [
            (f"{len(index):,}", "images"),
            (f"{len(index.boxes):,}", "boxes"),
            (f"{index.num_classes:,}", f"classes, {empty} without an image" if empty else "classes"),
            *([] if data.index.all_known else [(f"{len(index.verified_class):,}", "image-level labels")]),
            (f"{len(index.boxes) / len(index):.1f}", "boxes per image"),
            (f"{np.mean(np.diff(index.box_start) == 0):.1%}", "images without a box"),
            (f"{np.mean(index.is_group_of) if len(index.boxes) else 0:.1%}", "boxes are group-of"),
        ]
    )
    if len(data.dropped):
        written.page.text(f"{len(data.dropped):,} rows or images were left out on reading; dropped.csv lists them.")
        written.csv(data.dropped, "dropped.csv")


def _classes(written: Report, data: Explored) -> None:
    bins, page = data.bins, written.page
    page.section("Classes and bins", "Images count for a class and for its ancestors, as bins and sampling see them.")
    written.picture(
        class_frequency(
            bins.images_per_class, edges=bins.edges, bin_of_class=bins.bin_of_class, names=data.index.taxonomy.labels
        ),
        "class_frequency.png",
    )
    members = [data.table[data.table["bin"] == number] for number in range(1, bins.num_bins + 1)]
    page.table(
        pd.DataFrame(
            {
                "bin": range(1, bins.num_bins + 1),
                "classes": [len(part) for part in members],
                "fewest images": [part["tree_images"].min() for part in members],
                "most images": [part["tree_images"].max() for part in members],
                "boxes": [part["boxes"].sum() for part in members],
                "for example": [", ".join(part["class"][:4]) for part in members],
            }
        )
    )
    page.section("The tail", "Boxes as given, without what the hierarchy implies.")
    written.picture(data_figures.tail(exploration.tail_shares(data.given.boxes_per_class)), "tail.png")
    page.section("Every class", "Rarest first; a click on a heading sorts. class_statistics.csv is the same table.")
    page.table(data.table.round(4), tall=len(data.table) > 25)
    written.csv(data.table, "class_statistics.csv")


def _boxes(written: Report, data: Explored, config: ExploreConfig) -> None:
    index, page = data.index, written.page
    page.section("Boxes per image")
    written.picture(data_figures.boxes_per_image(np.diff(index.box_start)), "boxes_per_image.png")
    image_size, num_buckets = config.image_size, config.num_buckets
    page.section("Box sizes", f"After images are resized to image_size={image_size}. COCO calls a box below 32 small.")
    pixels = exploration.box_sides(index) * image_size
    bins_of_boxes = data.bins.bin_of_class[np.asarray(index.labels)]
    written.picture(data_figures.box_sizes(pixels, bins_of_boxes, image_size=image_size), "box_sizes.png")
    page.section("Shapes and buckets")
    if not data.has_sizes:
        page.text("Left out: samples=0 opens no image file, so image sizes are not known.")
        return
    shapes = exploration.fit_shapes(index, image_size=image_size, num_buckets=num_buckets)
    page.text(
        f"num_buckets={num_buckets} makes {len(shapes.images)} here. Images are squeezed by a factor of "
        f"{np.median(shapes.squeeze):.3f} at the median, {np.percentile(shapes.squeeze, 99):.2f} at the 99th "
        f"percentile and {shapes.squeeze.max():.2f} at most."
    )
    aspects = np.asarray(index.sizes)[:, 0] / np.asarray(index.sizes)[:, 1]
    written.picture(
        data_figures.shapes(aspects, shapes.buckets.shapes, shapes.images, exploration.box_aspects(index)), "shapes.png"
    )
    if len(index.boxes):
        _anchors(written, data, config, shapes.buckets)


def _anchors(written: Report, data: Explored, config: ExploreConfig, buckets: AspectBuckets) -> None:
    page, scale = written.page, config.anchor_scale
    page.section(
        "Anchors",
        "A box is learned from the anchors that it shares an IoU of 0.5 with; one that meets none is hardly learned. "
        f"Measured on at most 1,000 boxes of each class, image_size={config.image_size} and anchor_scale={scale:g}, "
        "the least met class first. anchors.csv is the same table.",
    )
    sample = BoxSample.draw(data.index)
    reach = class_reach(sample, buckets, scale)
    table = reach.rename(columns={"label": "class"})
    page.table(table.round({"median_side": 1, "reached": 3}), tall=len(table) > 25)
    written.csv(table, "anchors.csv")
    line = advice(reach, sample, buckets, scale)
    if line:
        page.text(f"{line[0].upper()}{line[1:]}.")
        report(line)
    page.text("Share of boxes that meet an anchor, in the mean over classes, with other settings:")
    sizes, count = np.asarray(data.index.sizes), config.num_buckets
    others = reach_of_settings(sample, sizes, image_size=config.image_size, num_buckets=count)
    page.table(others.round(3).rename_axis("image_size").reset_index())


def _together(written: Report, data: Explored) -> None:
    written.page.section(
        "Classes that occur together",
        "Of the images with the row's class, the per cent that hold the column's class too (boxes as given).",
    )
    order = np.argsort(-data.given.images_per_class, kind="stable")
    order = order[data.given.images_per_class[order] > 0]
    if len(order) == 0:
        written.page.text("There are no boxes.")
        return
    frequent, rarest = order[:HEAT_MAP_CLASSES], order[::-1][:HEAT_MAP_CLASSES]
    title = "The most frequent classes" if len(order) > len(frequent) else "All classes"
    found = exploration.cooccurrence(data.given, frequent, frequent)
    written.picture(_heat_map(data, found, title), "cooccurrence_frequent.png")
    if len(order) > len(frequent):
        found = exploration.cooccurrence(data.given, rarest, most=HEAT_MAP_CLASSES)
        if len(found.columns):
            title = "The rarest classes, and the others that are most often on their images"
            written.picture(_heat_map(data, found, title), "cooccurrence_rarest.png")
        else:
            written.page.text("The rarest classes share their images with no other class.")


def _heat_map(data: Explored, found: exploration.Cooccurrence, title: str) -> Figure:
    return data_figures.cooccurrence(found.share, data.names(found.rows), data.names(found.columns), title=title)


def _labels(written: Report, data: Explored) -> None:
    index, page, table = data.index, written.page, data.table
    boxed = "exhaustive=true: all objects are boxed, so a class that is not boxed on an image is absent there."
    unknown = "A class that is neither verified nor boxed on an image is unknown there."
    page.section("Verified labels", boxed if data.index.all_known else unknown)
    if not data.index.all_known and len(index.verified_class):
        bins = table["bin"].fillna(0).to_numpy(dtype=np.int64) - 1
        present, absent = table["verified_present"].to_numpy(), table["verified_absent"].to_numpy()
        page.text(
            f"{len(index.verified_class) / len(index):.1f} labels per image, {np.mean(index.verified_present):.0%} of "
            f"them present. On an average image {data.table['known'].mean():.1%} of the classes are known; "
            f"{int((absent == 0).sum())} of {len(table)} classes are nowhere verified absent."
        )
        written.picture(data_figures.label_coverage(present, absent, bins, list(table["class"])), "label_coverage.png")
    elif not data.index.all_known:
        page.text("There are no image-level labels: on each image only boxed classes are known.")
    page.section("Group-of and other flags")
    shares = exploration.flag_shares(index)
    page.table(pd.DataFrame({"flag": shares.keys(), "share of the boxes": shares.values()}))
    if index.is_group_of.any():
        share, boxes = table["group_of"].to_numpy(dtype=np.float64), table["boxes"].to_numpy()
        written.picture(data_figures.group_of(share, boxes, list(table["class"])), "group_of.png")


def _suspicious(written: Report, data: Explored) -> pd.DataFrame:
    found = list(suspicions(data.index))
    counts = pd.DataFrame(
        {"rule": [s.rule for s in found], "rows": [len(s.rows) for s in found], "meaning": [s.meaning for s in found]}
    )
    written.page.section(
        "Suspicious rows",
        "Rows that keep every rule and still look wrong. Nothing was left out for it; have a look.",
    )
    written.page.table(counts)
    parts = [suspicious_table(data.index, s, most=LISTED_ROWS) for s in found if len(s.rows)]
    if parts:
        written.page.text(
            f"suspicious.csv lists the first {LISTED_ROWS:,} of each rule; here are {SHOWN_ROWS} of each."
        )
        written.csv(pd.concat(parts, ignore_index=True), "suspicious.csv")
        written.page.table(pd.concat([part[:SHOWN_ROWS] for part in parts]).fillna("").round(4), tall=True)
    return counts


def _samples(written: Report, data: Explored, most: int) -> None:
    written.page.section("The rarest classes, one image each", "Only the boxes of the class in question are drawn.")
    panels: list[Panel] = []
    for row in data.table.itertuples():
        if len(panels) < most and (panel := _panel(data, data.index.taxonomy.index_of[str(row.class_id)])):
            panels.append(panel)
    written.picture(contact_sheet(panels), "rarest_classes.png", photographs=True)


def _panel(data: Explored, class_index: int) -> Panel | None:
    """An image of the class, the one with its largest box; None when there is none that can be read."""
    index = data.index
    rows = np.flatnonzero(np.asarray(index.labels) == class_index)
    if len(rows) == 0:
        return None
    extent = np.asarray(index.boxes[rows, 2:] - index.boxes[rows, :2])
    image = int(index.box_image[rows[extent.prod(axis=1).argmax()]])
    height, width = (int(side) for side in index.sizes[image])
    scale = min(1.0, _SHEET_PIXELS / max(height, width))
    try:
        pixels = decode(
            index.file_of(image), (height, width), (max(round(height * scale), 1), max(round(width * scale), 1))
        )
    except UnreadableImageError as error:
        report(f"not on the sheet: {error}")
        return None
    own = rows[index.box_image[rows] == image]
    images = int(data.given.images_per_class[class_index])
    name = index.taxonomy.labels[class_index]
    return Panel(
        image=pixels,
        title=f"{name}: {images:,} image{'s' if images > 1 else ''}",
        gt_boxes=np.asarray(index.boxes[own]),
        gt_labels=[name] * len(own),
        gt_group_of=index.is_group_of[own],
    )


def _metrics(data: Explored, suspicious: pd.DataFrame) -> dict[str, float]:
    index = data.index
    counts = {
        f"explore/{str(rule).replace(' ', '_')}": float(rows)
        for rule, rows in zip(suspicious["rule"], suspicious["rows"], strict=True)
    }
    totals = {"images": len(index), "boxes": len(index.boxes), "labels": len(index.verified_class)}
    return {**{f"explore/{name}": float(value) for name, value in totals.items()}, **counts}
