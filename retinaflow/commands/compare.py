"""``compare``: which settings are better, for which classes, and is that chance? One HTML page and its tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retinaflow.comparison.chosen_runs import ChosenRun, as_sides, chosen_runs
from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.comparison.comparison_page import PageNotes, comparison_page, page_notes
from retinaflow.comparison.conclusion import conclusion
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.progress import report
from retinaflow.runs.run import Run, with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import CompareConfig


def run(config: CompareConfig) -> Comparison:
    """Compare, write the page, log it as a run of its own, and print the result."""
    chosen = chosen_runs(config)
    sides = as_sides(chosen)
    resampling = Resampling(config.bootstrap, config.confidence, config.seed)
    comparison = compare_runs(sides, resampling)
    notes = page_notes(chosen, comparison, samples=config.samples)
    page = comparison_page(comparison, notes)
    with start_run("compare", config) as run:
        run.log_params(config.model_dump())
        run.set_tags(_links(chosen, comparison, notes.title))
        run.log_metrics(_metrics(comparison), step=0)
        for target in with_folder(run, config):
            _write(target, comparison, notes, page)
        for side in sides[1:]:
            report(f"{side.letter} ({side.name}) against A ({sides[0].name}):\n{_lines(comparison, side)}")
        report(f"report: {config.output / 'comparison.html'}" + (f", run {run.run_id}" if config.track else ""))
    return comparison


def _links(chosen: Sequence[Sequence[ChosenRun]], comparison: Comparison, title: str) -> dict[str, str]:
    """Tags with the compared runs; the description shown on the run's page has links to theirs."""
    lines = [f"**{title}**", ""]
    for side in comparison.sides[1:]:
        lines += [f"{side.letter}: {conclusion(comparison, side).headline}", ""]
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
    target.log_text(page, "comparison.html")


def _lines(comparison: Comparison, side: Side) -> str:
    found = conclusion(comparison, side)
    return "\n".join([f"  {found.headline}", *(f"  - {sentence}" for sentence in found.sentences)])
