"""A comparison of runs as one HTML page: the answer in sentences, then settings, groups, figures, samples, classes;
and what it shows besides the numbers: runs, remarks, images of objects that one run finds and the other misses.

The page follows :mod:`~retinaflow.reports.page`: it needs nothing but itself, and its script only sorts and searches.
About 300 bytes per class and 20 kB per sample image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from retinaflow.comparison.chosen_runs import ChosenRun, differing_settings
from retinaflow.comparison.comparison import LETTERS, Comparison, Side
from retinaflow.comparison.conclusion import conclusion, extremes, group_name
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.comparison.found_and_missed import FoundObject, found_and_missed, sample_image
from retinaflow.comparison.images_of_run import images_of_run
from retinaflow.data.images import decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError, first_line
from retinaflow.reports.page import data_url, figure_url, render

MOST_LISTED = 8
SAMPLED_CLASSES = 30
"""Sample objects are looked for in so many classes, those that differ most."""
LARGEST_SIDE = 1600
"""Pixels; larger images are shrunk before a sample is cut out of them."""
FIGURE_DPI = 110


@dataclass(frozen=True)
class RunNote:
    """One run on the page."""

    letter: str
    name: str
    run_id: str
    seed: str
    link: str | None
    """Address of the run's page, or None when there is no server."""
    about: str
    """When it was made and from which code."""


@dataclass(frozen=True)
class SampleImage:
    """An object that one side finds and the other misses: its image and its text."""

    class_name: str
    text: str
    jpeg: bytes


@dataclass(frozen=True)
class PageNotes:
    """What the page shows besides the numbers."""

    title: str
    runs: Sequence[RunNote]
    settings: pd.DataFrame
    """Settings that differ: ``setting``, then a column per letter."""
    samples: Mapping[tuple[str, str], Sequence[SampleImage]]
    """(letter that finds, letter that misses) -> their images."""
    remarks: Sequence[str]
    """What the reader must know: classes left out, why there are no sample images."""


def comparison_page(comparison: Comparison, notes: PageNotes) -> str:
    """The page as text."""
    later = comparison.sides[1:]
    order = comparison.groups.set_index("group", drop=False)
    first = [name for name in ("mAP", "mAP_rare", "mAP_common", "mAP_frequent") if name in order.index]
    groups = order.loc[[*first, *(name for name in order.index if name not in first)]]
    return render(
        "comparison.html",
        filters={"ap": _ap, "signed": _signed, "group": group_name, "glyph": _glyph, "p": _p},
        comparison=comparison,
        notes=notes,
        later=later,
        many=len(later) > 1,
        conclusions={side.letter: conclusion(comparison, side) for side in later},
        figures={side.letter: _figures(comparison.classes, side) for side in later},
        helped={side.letter: _records(extremes(comparison.classes, side.letter, 1, MOST_LISTED)) for side in later},
        hurt={side.letter: _records(extremes(comparison.classes, side.letter, -1, MOST_LISTED)) for side in later},
        groups=_records(groups),
        classes=_records(comparison.classes),
        reach={"groups": _reach(groups, later), "classes": _reach(comparison.classes, later)},
        settings=notes.settings.to_dict("records"),
        samples=[
            (finder, other, [(image, data_url(image.jpeg, "jpeg")) for image in images])
            for (finder, other), images in notes.samples.items()
        ],
        sampled={image.class_name for images in notes.samples.values() for image in images},
    )


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _figures(table: pd.DataFrame, side: Side) -> dict[str, str]:
    return {
        name: figure_url(difference_vs_frequency(table, side.letter, narrow=narrow), dpi=FIGURE_DPI)
        for name, narrow in {"wide": False, "narrow": True}.items()
    }


def _ap(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.3f}"


def _p(value: float) -> str:
    return "" if np.isnan(value) else f"p {value:.2g}"


def _reach(table: pd.DataFrame, sides: Sequence[Side]) -> float:
    """The largest end of an interval that is drawn to the edge; rarer, wider ones are cut off."""
    ends = [table[f"{side.letter}_difference_{end}"].abs() for side in sides for end in ("low", "high")]
    values = pd.concat(ends).dropna()
    return float(max(values.quantile(0.95), 0.02)) if len(values) else 1.0


def _glyph(row: Mapping[str, float], letter: str, reach: float) -> str:
    """Path data of an interval on a line from -50 to 50, with the estimate as a short bar."""
    names = (f"{letter}_difference", f"{letter}_difference_low", f"{letter}_difference_high")
    if np.isnan([row[name] for name in names]).any():
        return ""
    at, low, high = (round(float(np.clip(row[name] / reach, -1, 1)) * 50) for name in names)
    return f"M{low} 6H{high}M{at} 2v8"


def page_notes(chosen: Sequence[Sequence[ChosenRun]], comparison: Comparison, *, samples: int) -> PageNotes:
    """The notes of a comparison, with up to ``samples`` objects that one run finds and the other misses, each way."""
    remarks = []
    if comparison.left_out:
        shown = ", ".join(comparison.left_out[:10]) + (" ..." if len(comparison.left_out) > 10 else "")
        remarks.append(
            f"The runs have different class lists. Compared are the {len(comparison.classes)} classes that all share; "
            f"all means are over these. Left out ({len(comparison.left_out)}): {shown}."
        )
    if len({tuple(row) for row in (_training_images(side) for side in comparison.sides)}) > 1:
        remarks.append("The runs were trained on different images; training counts and bins are those of A.")
    images: dict[tuple[str, str], list[SampleImage]] = {}
    if samples:
        try:
            index = images_of_run(chosen[0][0].stored)
            images = _sample_images(comparison, index, samples=max(samples // (len(chosen) - 1), min(samples, 2)))
        except (SettingError, DataError, OSError) as error:
            remarks.append(f"No sample images, as those evaluated cannot be read here: {first_line(error)}")
    title = f"{' and '.join(side.name for side in comparison.sides[1:])} against {comparison.sides[0].name}"
    return PageNotes(title, _run_notes(chosen), differing_settings(chosen), images, remarks)


def _run_notes(chosen: Sequence[Sequence[ChosenRun]]) -> list[RunNote]:
    return [
        RunNote(letter, run.record.name, run.record.run_id, run.seed, run.record.page, run.about)
        for letter, runs in zip(LETTERS, chosen, strict=False)
        for run in runs
    ]


def _training_images(side: Side) -> list[tuple[str, int]]:
    run = side.runs[0]
    return [(mid, int(count)) for mid, count in zip(run.class_ids, run.training.images, strict=True)]


def _sample_images(
    comparison: Comparison, index: AnnotationIndex, *, samples: int
) -> dict[tuple[str, str], list[SampleImage]]:
    """Objects that the first run of one side finds and that of the other misses, both ways, by their letters."""
    first, result = comparison.sides[0], {}
    for side in comparison.sides[1:]:
        for finder, other, sign in ((side, first, 1), (first, side, -1)):
            classes = extremes(comparison.classes, side.letter, sign, SAMPLED_CLASSES)["class_id"].tolist()
            found = found_and_missed(finder.runs[0], other.runs[0], index, class_ids=classes, limit=samples)
            result[finder.letter, other.letter] = [_sample(one, index, finder, other) for one in found]
    return result


def _sample(found: FoundObject, index: AnnotationIndex, finder: Side, other: Side) -> SampleImage:
    pixels = decode_sized(index, found.image, longest=LARGEST_SIDE)
    instead = f"{other.letter} has {found.instead} there" if found.instead else f"{other.letter} has nothing there"
    name = index.taxonomy.labels[index.taxonomy.index_of[found.class_id]]
    text = f"{finder.letter} {found.score:.2f}; {instead}. Image {index.image_ids[found.image]}"
    return SampleImage(name, text, sample_image(pixels, found))
