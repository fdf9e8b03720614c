"""Settings of the commands that compare evaluated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from retinaflow.settings.fields import Names, OptionalText
from retinaflow.settings.groups import TrackingSettings


class ComparedRuns(TrackingSettings):
    """Which evaluated runs, and how sure a difference must be."""

    runs: Names = ()
    """Runs of train or evaluate by id or name (with track=false: folders), comma-separated, the first is compared
    with; runs of one setting with other seeds are joined by + (a1+a2+a3,b1+b2+b3). none: those that filter finds."""
    filter: OptionalText = None
    """MLflow filter, such as "params.num_bins = '7'"; runs that differ in their seed only are pooled. none: the two
    last trainings."""
    from_experiment: OptionalText = None
    """MLflow experiment that filter looks in; none: all."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the images for intervals."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence of the intervals; 1 - confidence is the share of false marks among the classes marked as sure."""


class CompareConfig(ComparedRuns):
    """``compare``: which setting is better, for which classes, and is that chance? One HTML report."""

    output: Path = Path("outputs/compare")
    """Folder that the report is written to, tracked or not."""
    samples: Annotated[int, Field(ge=0, le=50)] = 6
    """Pictures of objects that one run finds and the other misses, each way; 0: none."""


class PromoteConfig(ComparedRuns):
    """``promote``: register the best run's model as champion if it beats the present one."""

    register_as: str = "retinaflow"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias that the promoted version gets."""
    force: bool = False
    """Promote without a test."""
