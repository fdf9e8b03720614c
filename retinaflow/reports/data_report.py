"""The page about a data set before anything is trained on it: classes, boxes, shapes, labels, suspicious rows.

Each section is one function, in the order of the page. Figures and tables become files beside the page too. Cost: some
sections take a minute on millions of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.data import exploration
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.suspicious_annotations import suspicions, suspicious_table
from retinaflow.progress import report
from retinaflow.reports import data_figures
from retinaflow.reports.class_figures import class_frequency
from retinaflow.reports.class_sheet import one_image_per_class, pasted_images
from retinaflow.reports.page import Report
from retinaflow.settings.commands import ExploreConfig
from retinaflow.settings.data_settings import SamplingSettings
from retinaflow.training.anchor_fit import BoxSample, advice, class_reach, reach_of_settings

HEAT_MAP_CLASSES = 20
SHOWN_ROWS = 8
"""Suspicious rows of each rule on the page."""
LISTED_ROWS = 10_000
"""Suspicious rows of each rule in ``suspicious.csv``."""


@dataclass(frozen=True)
class ExploredData:
    """The data of the page. ``given`` counts boxes as published; ``bins`` count them as a training would."""

    index: AnnotationIndex
    given: ImageClassPairs
    bins: ClassBins
    table: pd.DataFrame
    """One row per class, see :func:`retinaflow.data.exploration.class_table`."""
    dropped: pd.DataFrame
    """Rows and images that were left out on reading."""

    @property
    def has_sizes(self) -> bool:
        """Whether the sizes of the images are known."""
        return bool((np.asarray(self.index.sizes) > 0).all())

    def names(self, classes: NDArray[np.integer]) -> list[str]:
        """Names of classes as shown to people."""
        return [self.index.taxonomy.labels[k] for k in classes]


def write_sections(page: Report, data: ExploredData, settings: ExploreConfig) -> pd.DataFrame:
    """All sections, with images of up to ``samples`` of the rarest classes; what a training with these settings would
    make of shapes and anchors. Returns the suspicious rows per rule."""
    _overview(page, data)
    report("classes and bins")
    _classes(page, data)
    report("boxes, sizes and shapes")
    _boxes(page, data, settings)
    report("classes together")
    _together(page, data)
    report("image-level labels")
    _labels(page, data)
    report("suspicious rows")
    suspicious = _suspicious(page, data)
    if settings.samples > 0:
        report("images of the rarest classes")
        _rarest_images(page, data, settings.samples)
        report("pasted crops")
        _pasted_crops(page, data, settings)
    return suspicious


def _overview(page: Report, data: ExploredData) -> None:
    index, empty = data.index, len(data.bins.empty_classes)
    page.facts(
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
        page.text(f"{data.dropped['rows'].sum():,} rows or images were left out on reading; dropped.csv lists them.")
        page.csv(data.dropped, "dropped.csv")


def _classes(page: Report, data: ExploredData) -> None:
    bins = data.bins
    page.section("Classes and bins", "Images count for a class and for its ancestors, as in bins and in sampling.")
    page.figure(
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
    page.section("The tail", "Boxes as given, without those that the hierarchy implies.")
    page.figure(data_figures.tail(exploration.tail_fractions(data.given.boxes_per_class)), "tail.png")
    page.section("Every class", "Rarest first; a click on a heading sorts. class_statistics.csv is the same table.")
    page.table(data.table.round(4), tall=len(data.table) > 25)
    page.csv(data.table, "class_statistics.csv")


def _boxes(page: Report, data: ExploredData, settings: ExploreConfig) -> None:
    index, image_size, num_buckets = data.index, settings.image_size, settings.num_buckets
    page.section("Boxes per image")
    page.figure(data_figures.boxes_per_image(np.diff(index.box_start)), "boxes_per_image.png")
    page.section("Box sizes", f"After images are resized to image_size={image_size}. COCO calls a box below 32 small.")
    pixels = exploration.box_sides(index) * image_size
    bins_of_boxes = data.bins.bin_of_class[np.asarray(index.labels)]
    page.figure(data_figures.box_sizes(pixels, bins_of_boxes, image_size=image_size), "box_sizes.png")
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
    page.figure(
        data_figures.shapes(aspects, shapes.buckets.shapes, shapes.images, exploration.box_aspects(index)), "shapes.png"
    )
    if len(index.boxes):
        _anchors(page, data, settings, shapes.buckets)


def _anchors(page: Report, data: ExploredData, settings: ExploreConfig, buckets: AspectBuckets) -> None:
    scale = settings.anchor_scale
    page.section(
        "Anchors",
        "A box is learned from the anchors with which it has an IoU of 0.5 or more; without such an anchor it is "
        f"hardly learned. Measured on at most 1,000 boxes of each class, image_size={settings.image_size} and "
        f"anchor_scale={scale:g}; the class with the fewest reached boxes comes first. anchors.csv is the same table.",
    )
    sample = BoxSample.draw(data.index)
    reach = class_reach(sample, buckets, scale)
    table = reach.rename(columns={"label": "class"})
    page.table(table.round({"median_side": 1, "reached": 3}), tall=len(table) > 25)
    page.csv(table, "anchors.csv")
    line = advice(reach, sample, buckets, scale)
    if line:
        page.text(f"{line[0].upper()}{line[1:]}.")
        report(line)
    page.text("Fraction of boxes that an anchor reaches, mean over classes, with other settings:")
    sizes = np.asarray(data.index.sizes)
    others = reach_of_settings(sample, sizes, image_size=settings.image_size, num_buckets=settings.num_buckets)
    page.table(others.round(3).rename_axis("image_size").reset_index())


def _together(page: Report, data: ExploredData) -> None:
    page.section(
        "Classes that occur together",
        "Per cent of the images with the class of the row that also hold the class of the column (boxes as given).",
    )
    order = np.argsort(-data.given.images_per_class, kind="stable")
    order = order[data.given.images_per_class[order] > 0]
    if len(order) == 0:
        page.text("There are no boxes.")
        return
    frequent, rarest = order[:HEAT_MAP_CLASSES], order[::-1][:HEAT_MAP_CLASSES]
    title = "The most frequent classes" if len(order) > len(frequent) else "All classes"
    found = exploration.cooccurrence(data.given, frequent, frequent)
    page.figure(_heat_map(data, found, title), "cooccurrence_frequent.png")
    if len(order) > len(frequent):
        found = exploration.cooccurrence(data.given, rarest, most=HEAT_MAP_CLASSES)
        if len(found.columns):
            title = "The rarest classes, and the others that are most often on their images"
            page.figure(_heat_map(data, found, title), "cooccurrence_rarest.png")
        else:
            page.text("No other class occurs on the images of the rarest classes.")


def _heat_map(data: ExploredData, found: exploration.Cooccurrence, title: str) -> Figure:
    return data_figures.cooccurrence(found.fraction, data.names(found.rows), data.names(found.columns), title=title)


def _labels(page: Report, data: ExploredData) -> None:
    index, table = data.index, data.table
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
        page.figure(data_figures.label_coverage(present, absent, bins, list(table["class"])), "label_coverage.png")
    elif not data.index.all_known:
        page.text("There are no image-level labels: on each image only boxed classes are known.")
    page.section("Group-of and other flags")
    fractions = exploration.flag_fractions(index)
    page.table(pd.DataFrame({"flag": fractions.keys(), "fraction of the boxes": fractions.values()}))
    if index.is_group_of.any():
        fraction, boxes = table["group_of"].to_numpy(dtype=np.float64), table["boxes"].to_numpy()
        page.figure(data_figures.group_of(fraction, boxes, list(table["class"])), "group_of.png")


def _suspicious(page: Report, data: ExploredData) -> pd.DataFrame:
    found = list(suspicions(data.index))
    counts = pd.DataFrame(
        {"rule": [s.rule for s in found], "rows": [len(s.rows) for s in found], "meaning": [s.meaning for s in found]}
    )
    page.section(
        "Suspicious rows",
        "These rows are valid but unusual. None of them was left out; please look at them.",
    )
    page.table(counts)
    parts = [suspicious_table(data.index, s, most=LISTED_ROWS) for s in found if len(s.rows)]
    if parts:
        page.text(f"suspicious.csv lists the first {LISTED_ROWS:,} of each rule; here are {SHOWN_ROWS} of each.")
        page.csv(pd.concat(parts, ignore_index=True), "suspicious.csv")
        page.table(pd.concat([part[:SHOWN_ROWS] for part in parts]).fillna("").round(4), tall=True)
    return counts


def _rarest_images(page: Report, data: ExploredData, most: int) -> None:
    page.section("The rarest classes, one image each", "Only the boxes of the class in the title are drawn.")
    classes = [data.index.taxonomy.index_of[str(row.class_id)] for row in data.table.itertuples()]
    sheet = one_image_per_class(data.index, classes, data.given.images_per_class, most=most)
    page.figure(sheet, "rarest_classes.png", photographs=True)


def _pasted_crops(page: Report, data: ExploredData, settings: ExploreConfig) -> None:
    page.section(
        "Pasted crops",
        "What copy_paste would train on: images with a crop of a rare class, and the boxes that are learned from them "
        "(a dashed box is an ignored region).",
    )
    balance = SamplingSettings().balance
    copy_paste = CopyPaste.by_rarity(data.index, data.bins, probability=1.0, balance=balance)
    if copy_paste is None:
        page.text("Left out: no class is rarer than the others and has a box that can be cropped.")
        return
    sizes = np.asarray(data.index.sizes)
    buckets = AspectBuckets.fit(sizes, image_size=settings.image_size, num_buckets=settings.num_buckets)
    page.figure(pasted_images(copy_paste, buckets, most=settings.samples), "pasted_crops.png", photographs=True)
