"""The kinds of value that settings have, and how they are written: lists with commas, ``none``, ``auto``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from retinaflow.settings.suppression import read_rules


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


Auto = Literal["auto"]
Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(split_list)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split_list)]
OptionalPath = Annotated[Path | None, BeforeValidator(none_of)]
OptionalText = Annotated[str | None, BeforeValidator(none_of)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Thresholds = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...] | Literal["coco"],
    BeforeValidator(lambda value: value if value == "coco" else split_list(value)),
]


def _number_or_list(value: Any) -> Any:
    return split_list(value) if isinstance(value, str) and "," in value else value


def _is_list(value: Any) -> str:
    return "list" if isinstance(value, tuple | list) else "number"


NonNegative = Annotated[float, Field(ge=0)]
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


def _are_rules(text: str) -> str:
    try:
        read_rules(text)
    except ValueError as error:
        raise PydanticCustomError("rules", "{rule}", {"rule": str(error).partition(", but ")[0]}) from None
    return text


SuppressionRules = Annotated[str, AfterValidator(_are_rules)]
"""See :mod:`retinaflow.settings.suppression`."""


Searchable = Annotated[Any, BeforeValidator(as_text)]
"""A setting that may be searched, as text: ``low..high`` (``low..high:log``), choices ``a,b,c``, or one value, which is
not searched. The values keep to the rules that the setting has in training."""
