"""Groups of settings, one frozen class per subject: where results go, which data, splits, bins, sampling.

A group is what the domain takes: ``image_weights`` takes :class:`SamplingSettings`. The settings of a command are made
of groups by inheritance (:mod:`retinaflow.settings.commands`), so a ``TrainConfig`` can be passed wherever a group is
wanted, and nothing is copied from one class to another. A group is complete as soon as it is made: ``auto`` is accepted
as a value and replaced by what it means here, never handed on.

The docstring of a field is its help text and gives meaning, unit and special values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from retinaflow.settings.value_types import (
    FREE,
    STEERS,
    AtLeastOne,
    Auto,
    Count,
    Fraction,
    Names,
    NonNegative,
    Numbers,
    OptionalPath,
    OptionalText,
    Paths,
    Positive,
    Searched,
    as_text,
    auto,
    by_length,
    is_pretrained,
    split_list,
)

GroupType = TypeVar("GroupType", bound="Settings")
DEFAULT_EXPERIMENT = "retinaflow"
EXPERIMENT_VARIABLES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
"""Environment variables of MLflow that name the experiment where no setting does."""


_LARGEST = (1 << 32) - 1


class Settings(BaseModel):
    """Behaviour of all groups and of all settings of a command: frozen, checked, complete."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    title: ClassVar[str] = ""
    """Heading of the group in help."""

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, values: Any) -> Any:
        """The given values without those that are written ``auto``, so that their defaults are filled in."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value != "auto" or not cls.auto_of(name)}

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Whole numbers have 32 bits: more are not seconds, images or seeds, and no library takes them."""
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise PydanticCustomError("rule", f"a whole number must be at most {_LARGEST:,}")
        return value

    @classmethod
    def auto_of(cls, name: str) -> Auto | None:
        """The rule of a setting that may be ``auto``."""
        factory = cls.model_fields[name].default_factory if name in cls.model_fields else None
        return factory if isinstance(factory, Auto) else None

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default of a setting as it is written."""
        return "auto" if cls.auto_of(name) else as_text(cls.model_fields[name].default)

    @classmethod
    def declared_in(cls, name: str) -> type[Settings]:
        """The class, this one or one it inherits from, that declares a setting."""
        return next(kind for kind in cls.__mro__ if name in vars(kind).get("__annotations__", {}))

    def part(self, group: type[GroupType]) -> GroupType:
        """The settings of one group alone."""
        names = group.model_fields
        return group.model_construct(
            self.model_fields_set & set(names), **{name: getattr(self, name) for name in names}
        )


def with_defaults(
    *, texts: Mapping[str, str] | None = None, **defaults: Any
) -> Callable[[type[GroupType]], type[GroupType]]:
    """Decorator: other defaults, and where their meaning is narrower other ``texts``, for inherited settings."""

    def changed(kind: type[GroupType]) -> type[GroupType]:
        for name, value in defaults.items():
            field = kind.model_fields[name]
            field.default, field.default_factory = value, None
            field._attributes_set = {**field._attributes_set, "default": value}
            field._attributes_set.pop("default_factory", None)
        for name, text in (texts or {}).items():
            kind.model_fields[name].description = text
        kind.model_rebuild(force=True)
        return kind

    return changed


class SeedSettings(Settings):
    """Where randomness comes from."""

    title = "Results and tracking"

    seed: Count = 0
    """Random seed."""


class TrackingSettings(SeedSettings):
    """Where the results go; part of every command."""

    track: Annotated[bool, FREE] = True
    """Log to MLflow; false writes the same files to output only."""
    experiment: Annotated[OptionalText, FREE] = auto(
        "that of MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else retinaflow",
        lambda values: None if any(map(os.environ.get, EXPERIMENT_VARIABLES)) else DEFAULT_EXPERIMENT,
    )
    """MLflow experiment of a run started without mlflow run, which has --experiment-name."""
    output: Annotated[Path, FREE] = Path("outputs")
    """Folder for what the command writes."""
    config: Annotated[OptionalText, FREE] = None
    """YAML file of settings (a path, or runs:/RUN_ID/best.yaml); flags take precedence."""


# Data

OnBadImage = Literal["stop", "skip"]
OnBadRow = Literal["stop", "drop"]


class ImageFileSettings(Settings):
    """Where image files are."""

    title = "Data"

    data: Annotated[str, FREE] = "demo"
    """Folder in the Open Images layout, or demo for the generated set."""
    images: Annotated[Paths, FREE] = ()
    """Image folders, instead of images/, images/SPLIT and SPLIT/ in the data folder."""
    size_table: Annotated[OptionalPath, FREE] = None
    """Table of image sizes (ImageID,Width,Height) to use instead of the header of every file."""
    on_bad_image: Annotated[OnBadImage, FREE] = "stop"
    """An unreadable image stops the command, or is skipped and listed in dropped.csv."""


class DataSettings(ImageFileSettings):
    """Which files are read, and which of their classes."""

    boxes: Annotated[Paths, FREE] = ()
    """CSV files of boxes, instead of those found by split."""
    image_labels: Annotated[
        tuple[Path, ...] | Literal["none"], BeforeValidator(lambda v: v if v == "none" else split_list(v)), FREE
    ] = ()
    """CSV files of image-level labels, instead of those found by split; none: there are none."""
    classes: Annotated[OptionalPath, FREE] = None
    """Class list (id,name), instead of the one found in the data folder."""
    hierarchy: Annotated[OptionalText, FREE] = "auto"
    """Class hierarchy (JSON); auto: found in the data folder; none: no hierarchy."""
    class_group: str = "all"
    """Classes to use: all, people-clothing, rest, bin:K, names or ids, or a file of them."""
    exhaustive: Annotated[bool, FREE] = False
    """Every object of every class is boxed: a class without a label on an image counts as verified absent."""
    on_bad_row: Annotated[OnBadRow, FREE] = "stop"
    """A row that breaks a rule stops the command, or is dropped and listed in dropped.csv."""

    @property
    def label_files(self) -> tuple[Path, ...] | None:
        """The files of image-level labels; empty: those found by split; None: there are none."""
        return None if self.image_labels == "none" else self.image_labels


class TrainSplitSettings(Settings):
    """What is trained on."""

    title = "Data"

    train_splits: Annotated[Names, Field(min_length=1), FREE] = ("train",)
    """Splits to train on."""
    background_ratio: Annotated[NonNegative, FREE] = 1.0
    """class_group: training images without its boxes per image with them, verified absent first."""


class EvalSplitSettings(Settings):
    """What is evaluated on."""

    title = "Data"

    eval_split: Annotated[str, FREE] = "validation"
    """Split to evaluate on."""
    eval_ids: Annotated[OptionalPath, FREE] = None
    """File of image ids to evaluate on; train takes them out of its training splits; none: all of eval_split."""


class SplitSettings(TrainSplitSettings, EvalSplitSettings):
    """What is trained on and what is evaluated on."""

    eval_boxes: Annotated[Paths, FREE] = ()
    """CSV files of boxes to evaluate on, instead of those of eval_split."""
    eval_image_labels: Annotated[Paths, FREE] = ()
    """CSV files of image-level labels to evaluate on, instead of those of eval_split."""


FOLDER_SETTINGS: tuple[str, ...] = ("exhaustive", "image_labels", "hierarchy", "train_splits", "eval_split")
"""Settings that ``retinaflow.yaml`` in a data folder may give: what is true of the data whoever uses it. Paths are not
among them, so a folder from elsewhere cannot point out of itself."""


# Bins and sampling

BinStrategy = Literal["log", "quantile", "jenks"]
BinRates = Literal["step", "smooth"]
Strategy = Literal["uniform", "repeat-factor", "instance-repeat-factor", "class-aware", "binned"]

_BINNED: Mapping[str, tuple[Any, ...]] = {"sampling": ("binned",)}
_BINS_SEARCHED: Mapping[str, tuple[Any, ...]] = {**_BINNED, "bin_edges": ((),)}
"""Explicit edges leave the number of bins and the strategy without effect."""


class BinSettings(Settings):
    """How classes are put into frequency bins."""

    title = "Bins and sampling"

    bin_strategy: Annotated[BinStrategy, Searched("log,quantile,jenks", _BINS_SEARCHED)] = "log"
    """How the axis of log10(training images) is cut into bins."""
    num_bins: Annotated[AtLeastOne, Searched("2..12", _BINS_SEARCHED)] = 7
    """Number of frequency bins; empty ones are merged; 1: sampling=binned is uniform."""


class SamplingSettings(Settings):
    """How often each image is sampled in an epoch; each strategy reads its own settings."""

    title = "Bins and sampling"

    sampling: Annotated[Strategy, STEERS, Searched("uniform,repeat-factor,class-aware,binned")] = by_length(
        "class-aware", "binned", demo="binned", when=is_pretrained, condition="from pretrained weights"
    )
    """How often images are sampled."""
    balance: Annotated[Fraction, STEERS, Searched("0.1..0.9", _BINNED)] = 0.75
    """binned: quantile of images per class that rarer bins are lifted to; 0 lifts none."""
    bin_rates: Annotated[BinRates, STEERS] = "smooth"
    """binned: one rate for all classes of a bin (step), or interpolated between bins (smooth)."""
    class_power: Annotated[Fraction, STEERS, Searched("0..1", {"sampling": ("class-aware",)})] = 0.0
    """class-aware: a class is sampled in proportion to its images to this power; 0: all classes alike."""
    empty_image_rate: Annotated[Positive, STEERS, Searched()] = 1.0
    """binned: how often an image without boxes is sampled, relative to the least sampled one with boxes."""
    correction_steps: Annotated[Count, STEERS] = 0
    """binned: steps that correct the rates for classes that occur together."""
    repeat_threshold: Annotated[
        float,
        Field(gt=0, le=1),
        STEERS,
        Searched("0.003..0.3:log", {"sampling": ("repeat-factor", "instance-repeat-factor")}),
    ] = 0.001
    """repeat-factor and instance-repeat-factor: fraction of images below which a class is repeated."""
    max_repeats: Annotated[float, Field(ge=1), STEERS] = 100.0
    """Maximum samples of one image in an epoch."""
    epoch_length: Count = 0
    """Images per epoch; 0: as many as there are."""


class SampledDataSettings(SamplingSettings, BinSettings, SplitSettings, DataSettings, SeedSettings):
    """Training data, from files to the sampling of an epoch."""

    bin_edges: Numbers = ()
    """Explicit cuts between bins, in training images (10,100,1000); none: by bin_strategy and num_bins."""
    parents: Literal["learn", "expand", "ignore"] = "learn"
    """Parent classes: learned from boxes of their children, detections expanded to them, or ignored."""
