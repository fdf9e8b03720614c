"""What the comparison page shows besides the numbers: runs, settings, remarks, and sample images of both sides."""

from __future__ import annotations

from collections.abc import Sequence

from retinaflow.comparison.chosen_runs import ChosenRun, differing_settings
from retinaflow.comparison.comparison import LETTERS, Comparison, Side
from retinaflow.comparison.comparison_page import PageNotes, RunNote, SampleImage
from retinaflow.comparison.conclusion import extremes
from retinaflow.comparison.found_and_missed import FoundObject, found_and_missed, sample_image
from retinaflow.comparison.images_of_run import images_of_run
from retinaflow.data.images import decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError, first_line

SAMPLED_CLASSES = 30
"""Sample objects are looked for in so many classes, those that differ most."""
LARGEST_SIDE = 1600
"""Pixels; larger images are shrunk before a sample is cut out of them."""


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
    height, width = (int(side) for side in index.sizes[found.image])
    shrink = min(1.0, LARGEST_SIDE / max(height, width))
    pixels = decode(
        index.file_of(found.image),
        (height, width),
        (max(round(height * shrink), 1), max(round(width * shrink), 1)),
    )
    instead = f"{other.letter} has {found.instead} there" if found.instead else f"{other.letter} has nothing there"
    name = index.taxonomy.labels[index.taxonomy.index_of[found.class_id]]
    text = f"{finder.letter} {found.score:.2f}; {instead}. Image {index.image_ids[found.image]}"
    return SampleImage(name, text, sample_image(pixels, found))
