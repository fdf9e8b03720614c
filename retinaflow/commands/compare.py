"""``compare``: which settings are better, for which classes, and is that chance? One HTML report and its tables."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retinaflow.comparison.chosen_runs import ChosenRun, as_sides, chosen_runs, differing_settings, run_notes
from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.comparison.evaluated_images import evaluated_images
from retinaflow.comparison.found_and_missed import Sample, found_and_missed, sample_image
from retinaflow.comparison.page import PageNotes, SampleImage, comparison_page
from retinaflow.comparison.wording import extremes, verdict
from retinaflow.data.images import decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.progress import report
from retinaflow.runs import tracking
from retinaflow.runs.run import FolderRun, Run
from retinaflow.settings.comparison_commands import CompareConfig

LOOKED_AT = 30
"""Classes that differ most, among which sample objects are looked for."""
LARGEST_SIDE = 1600
"""Pixels; larger images are shrunk before a sample is cut out of them."""


def run(config: CompareConfig) -> Comparison:
    """Compare, write the report, log it as a run of its own, and say what came out."""
    chosen = chosen_runs(config)
    sides = as_sides(chosen)
    resampling = Resampling(config.bootstrap, config.confidence, config.seed)
    comparison = compare_runs(sides, resampling)
    notes = page_notes(chosen, comparison, samples=config.samples)
    page = comparison_page(comparison, notes)
    with tracking.start_run("compare", track=config.track, experiment=config.experiment, output=config.output) as run:
        run.log_params(config.model_dump())
        run.set_tags(_links(chosen, comparison, notes.title))
        run.log_metrics(_metrics(comparison), step=0)
        for target in [run, FolderRun(config.output)] if config.track else [run]:
            _write(target, comparison, notes, page)
        for side in sides[1:]:
            report(f"{side.letter} ({side.name}) against A ({sides[0].name}):\n{_lines(comparison, side)}")
        report(f"the report: {config.output / 'comparison.html'}" + (f", run {run.run_id}" if config.track else ""))
    return comparison


def page_notes(chosen: Sequence[Sequence[ChosenRun]], comparison: Comparison, *, samples: int) -> PageNotes:
    """Settings, runs, sample pictures and remarks of the report."""
    remarks = []
    if comparison.left_out:
        shown = ", ".join(comparison.left_out[:10]) + (" ..." if len(comparison.left_out) > 10 else "")
        remarks.append(
            f"The runs have different class lists. Compared are the {len(comparison.classes)} classes that all share; "
            f"all means are over these. Left out ({len(comparison.left_out)}): {shown}."
        )
    if len({tuple(row) for row in (_counts(side) for side in comparison.sides)}) > 1:
        remarks.append("The runs were trained on different images; training counts and bins are those of A.")
    pictures: dict[tuple[str, str], list[SampleImage]] = {}
    if samples:
        try:
            index = evaluated_images(chosen[0][0].stored)
            pictures = _sample_pictures(comparison, index, samples=max(samples // (len(chosen) - 1), min(samples, 2)))
        except (ValueError, OSError) as error:
            remarks.append(f"No sample images, as those evaluated cannot be read here: {str(error).splitlines()[0]}")
    title = f"{' and '.join(side.name for side in comparison.sides[1:])} against {comparison.sides[0].name}"
    return PageNotes(title, run_notes(chosen), differing_settings(chosen), pictures, remarks)


def _counts(side: Side) -> list[tuple[str, int]]:
    run = side.runs[0]
    return [(mid, int(count)) for mid, count in zip(run.class_ids, run.training.images, strict=True)]


def _sample_pictures(
    comparison: Comparison, index: AnnotationIndex, *, samples: int
) -> dict[tuple[str, str], list[SampleImage]]:
    """Objects that the first run of one side finds and the first run of the other misses, both ways."""
    first, result = comparison.sides[0], {}
    for side in comparison.sides[1:]:
        for finder, other, sign in ((side, first, 1), (first, side, -1)):
            classes = extremes(comparison.classes, side.letter, sign, LOOKED_AT)["class_id"].tolist()
            found = found_and_missed(finder.runs[0], other.runs[0], index, class_ids=classes, limit=samples)
            result[finder.letter, other.letter] = [_picture(one, index, finder, other) for one in found]
    return result


def _picture(sample: Sample, index: AnnotationIndex, finder: Side, other: Side) -> SampleImage:
    height, width = (int(side) for side in index.sizes[sample.image])
    shrink = min(1.0, LARGEST_SIDE / max(height, width))
    pixels = decode(
        index.file_of(sample.image),
        (height, width),
        (max(round(height * shrink), 1), max(round(width * shrink), 1)),
    )
    instead = f"{other.letter} says {sample.instead}" if sample.instead else f"{other.letter} has nothing there"
    name = index.taxonomy.labels[index.taxonomy.index_of[sample.class_id]]
    text = f"{finder.letter} {sample.score:.2f}; {instead}. Image {index.image_ids[sample.image]}"
    return SampleImage(name, text, sample_image(pixels, sample))


def _links(chosen: Sequence[Sequence[ChosenRun]], comparison: Comparison, title: str) -> dict[str, str]:
    """Tags with the compared runs; the description shown on the run's page has links to theirs."""
    lines = [f"**{title}**", ""]
    for side in comparison.sides[1:]:
        lines += [f"{side.letter}: {verdict(comparison, side).headline}", ""]
    for side, runs in zip(comparison.sides, chosen, strict=True):
        lines += [
            f"- {side.letter}: [{one.record.name}]({one.record.path})"
            if one.record.experiment_id
            else f"- {side.letter}: {one.record.run_id}"
            for one in runs
        ]
    ids = ",".join("+".join(one.record.run_id for one in runs) for runs in chosen)
    return {"retinaflow.compared": ids, "mlflow.note.content": "\n".join(lines)}


def _metrics(comparison: Comparison) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for side in comparison.sides[1:]:
        letter, sure = side.letter, comparison.classes[f"{side.letter}_sure"].astype(bool)
        difference = comparison.classes[f"{letter}_difference"]
        metrics |= {
            f"{letter}/{name}_{part}": value
            for name in ("mAP", "mAP_rare", "mAP_common", "mAP_frequent")
            for part in ("difference", "difference_low", "difference_high")
            if (value := comparison.group(name).get(f"{letter}_{part}")) is not None
        }
        metrics |= {
            f"{letter}/classes_surely_better": float((sure & (difference > 0)).sum()),
            f"{letter}/classes_surely_worse": float((sure & (difference < 0)).sum()),
        }
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _write(target: Run, comparison: Comparison, notes: PageNotes, page: str) -> None:
    target.log_csv(comparison.groups, "comparison.csv")
    target.log_csv(comparison.classes, "per_class_comparison.csv")
    target.log_csv(notes.settings, "settings.csv")
    for side in comparison.sides[1:]:
        target.log_figure(difference_vs_frequency(comparison.classes, side.letter), f"difference_{side.letter}.png")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.html"
        path.write_text(page, encoding="utf-8")
        target.log_file(path)


def _lines(comparison: Comparison, side: Side) -> str:
    said = verdict(comparison, side)
    return "\n".join([f"  {said.headline}", *(f"  - {sentence}" for sentence in said.sentences)])
