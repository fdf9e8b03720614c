"""Settings of a search: its study, what it maximises, its trials and workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from retinaflow.settings.conversion_settings import DryRunSettings
from retinaflow.settings.value_types import AtLeastOne, Count, FolderName, Fraction, Names, Numbers, auto, none_of


class SearchSettings(DryRunSettings):
    """How settings are searched for."""

    title = "Search"

    study: FolderName = "search"
    """Name of the study; the same command with the same name resumes it."""
    trials: AtLeastOne = 40
    """Trials of the study in all, including those of earlier commands and other machines."""
    seeds: AtLeastOne = 1
    """Trainings of a trial (seed, seed + 1, ...), whose mean counts; pruning looks at the first. A trial that is worse
    than the best one beyond chance ends before its last seed."""
    search_patience: Count = 0
    """Trials without a better one after which the search stops; 0: it does not."""
    confirm_seeds: Count = 5
    """New seeds for comparing the best trial with the defaults; 0: not compared."""
    objective: Annotated[Names, Field(min_length=1, max_length=2)] = ("val/mAP_rare",)
    """What is maximised, and by which the best epoch of a training is kept: a metric as in keep_best, or bins (see
    bin_weights); two names give a Pareto front."""
    bin_weights: Numbers = ()
    """objective=bins: weights of the mean over bins, rarest first; bins without a weight count 0."""
    floor: Annotated[Fraction | None, BeforeValidator(none_of)] = None
    """Minimum of floor_metric that a trial must reach to be chosen; none: no floor."""
    floor_metric: str = "val/mAP_frequent"
    """Metric that floor applies to."""
    sampler: Literal["tpe", "random", "gp", "cmaes", "nsgaii"] = "tpe"
    """Optuna's sampler."""
    pruner: Literal["median", "hyperband", "none"] = auto(
        "median; none with two objectives", lambda values: "median" if len(values["objective"]) == 1 else "none"
    )
    """Which trials are ended early; none: no trial, and each is trained with all seeds."""
    storage: str = "auto"
    """Database of the study: a file or sqlite:/// for one machine, postgresql:// for many (passwords in PGPASSFILE or
    PGPASSWORD); auto: optuna.db beside the MLflow store."""
    search_workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that run trials on this machine, the cores divided among them."""
    heartbeat: AtLeastOne = 15
    """Seconds between signs of life of a trial; after four times that in silence the trial is run again."""
