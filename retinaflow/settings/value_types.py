"""What a setting is made of: the kinds of value and how they are written, the rule behind ``auto``, and metadata.

Lists are written with commas, an empty one and an absent value as ``none``. A field carries as metadata what may be
done with it beside its use: whether it may change when a training is resumed (:data:`FREE`, :data:`STEERS`), and
whether a search may set it (:class:`Searched`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

# Writing and reading


def as_text(value: Any) -> str:
    """``none``, ``true``, ``0.5``, or a list with commas (an empty one is ``none``)."""
    if isinstance(value, tuple | list):
        return ",".join(map(as_text, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def split_list(value: Any) -> Any:
    """Text with commas as a tuple, ``none`` as an empty one; anything else as it is."""
    if isinstance(value, str):
        return () if value == "none" else tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def none_of(value: Any) -> Any:
    """The written value ``none`` as None; anything else as it is."""
    return None if value == "none" else value


# Kinds of value

Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(split_list)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split_list)]
OptionalPath = Annotated[Path | None, BeforeValidator(none_of)]
OptionalText = Annotated[str | None, BeforeValidator(none_of)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


def _folder_name(value: Any) -> Any:
    name = str(value)
    if name in ("", ".", "..") or len(name.encode()) > 200 or any(letter in "/\\" or letter < " " for letter in name):
        raise PydanticCustomError(
            "folder_name", "the name of a folder has 1 to 200 bytes and no / or \\, and is not . or .."
        )
    return name


def metric_weights(names: Sequence[str]) -> dict[str, float]:
    """``NAME`` or ``NAME:WEIGHT`` each -> name and weight; a name that has a colon may be followed by its weight."""
    weights: dict[str, float] = {}
    for text in names:
        name, colon, last = text.rpartition(":")
        weight = _number(last) if colon else None
        name, weight = (text, 1.0) if weight is None else (name, weight)
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def metric_target(text: str) -> tuple[str, float]:
    """``NAME:VALUE`` -> both. Raises ValueError for anything else."""
    name, _, last = text.rpartition(":")
    value = _number(last)
    if not name or value is None:
        raise ValueError(text)
    return name, value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _weighted(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or not all(0 < weight < float("inf") for weight in metric_weights(names).values()):
        raise PydanticCustomError("weights", "a metric is NAME or NAME:WEIGHT, with a weight above 0")
    return names


def _target(text: str | None) -> str | None:
    try:
        if text is not None and not 0 < metric_target(text)[1] <= 1:
            raise ValueError(text)
    except ValueError:
        raise PydanticCustomError("target", "a target is METRIC:VALUE (val/mAP:0.5), with a value in (0, 1]") from None
    return text


WeightedMetrics = Annotated[tuple[str, ...], BeforeValidator(split_list), AfterValidator(_weighted)]
"""Metrics, each with its weight after a colon, or 1."""
MetricTarget = Annotated[str | None, BeforeValidator(none_of), AfterValidator(_target)]
"""A metric and the value that it shall reach."""
FolderName = Annotated[str, BeforeValidator(_folder_name)]
"""A name that becomes a folder inside of ``output``."""


def _number_or_list(value: Any) -> Any:
    return split_list(value) if isinstance(value, str) and "," in value else value


def _is_list(value: Any) -> str:
    return "list" if isinstance(value, tuple | list) else "number"


GammaByBin = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[tuple[NonNegative, ...], Tag("list")],
    Discriminator(_is_list),
    BeforeValidator(_number_or_list),
]
AlphaByBin = Annotated[
    Annotated[Fraction | None, Tag("number")] | Annotated[tuple[Fraction, ...], Tag("list")],
    Discriminator(_is_list),
    BeforeValidator(lambda value: none_of(_number_or_list(value))),
]
"""One value for all classes, or one for each frequency bin, rarest first."""

# auto


@dataclass(frozen=True)
class Auto:
    """The default of a setting whose default depends on the settings before it; ``auto`` may be written for it.

    ``rule``: the values of the settings before it -> its value; ``text``: what the rule gives, for help.
    """

    text: str
    rule: Callable[[Mapping[str, Any]], Any]

    def __call__(self, values: dict[str, Any]) -> Any:
        return self.rule(values)


def auto(text: str, rule: Callable[[Mapping[str, Any]], Any]) -> Any:
    """A default that depends on other settings; see :class:`Auto`."""
    return Field(default_factory=Auto(text, rule))


def by_data(photos: Any, *, demo: Any, text: str = "") -> Any:
    """A default for photographs, and another one for the generated set (small images, minutes on a laptop).

    ``text``: how a training chooses it by its images (:mod:`retinaflow.training.fit_to_data`); ``photos`` then stands
    for it until they are read.
    """
    return auto(f"{text or photos}, demo {demo}", lambda values: demo if values.get("data") == "demo" else photos)


@dataclass(frozen=True)
class ByLength(Auto):
    """A default for short trainings and another one for long ones. ``when``: the values of the settings -> whether a
    short training takes ``short``."""

    short: Any
    long: Any
    when: Callable[[Mapping[str, Any]], bool]


def by_length(
    short: Any,
    long: Any,
    *,
    demo: Any = None,
    when: Callable[[Mapping[str, Any]], bool] = lambda values: True,
    condition: str = "",
) -> Any:
    """A default that a training chooses by the number of images that it will see
    (:mod:`retinaflow.training.fit_to_data`); until they are read, that of long trainings.

    On the generated set a training is short; ``demo`` is another value for it. ``condition``: what ``when`` asks for.
    """

    def before_images(values: Mapping[str, Any]) -> Any:
        if values.get("data") != "demo" or not when(values):
            return long
        return short if demo is None else demo

    text = f"{short} in short trainings {condition}" if condition else f"short trainings {short}"
    text += f", else {long}" + ("" if demo in (None, long) else f"; demo {demo}")
    return Field(default_factory=ByLength(text, before_images, short, long, when))


def is_pretrained(values: Mapping[str, Any]) -> bool:
    """Whether a training starts from weights."""
    return bool(values.get("weights", "none") != "none")


# Metadata


class OnResume(Enum):
    """Whether a setting may change when a training is resumed. Without this metadata it may not."""

    FREE = "no effect on what was trained"
    STEERS = "changes the rest of the training, which is reported"


FREE, STEERS = OnResume.FREE, OnResume.STEERS


@dataclass(frozen=True)
class Searched:
    """A setting that ``search`` may vary.

    ``space``: its range or choices unless others are given; None: it is not searched unless a range is given.
    ``when``: other settings -> the values of theirs with which this one has an effect.
    """

    space: str | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
