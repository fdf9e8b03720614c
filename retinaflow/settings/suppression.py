"""How overlapping detections are suppressed, as written in the setting ``nms``: one rule, or one per class group.

    nms                                      every class by plain NMS at the setting nms_iou
    nms:0.6                                  ... at an IoU of 0.6
    people-clothing:soft-nms:0.3,rest:nms    people and clothing by soft-NMS of sigma 0.3, all others by plain NMS
    people-clothing:support-nms              the classes that no rule names: plain NMS at nms_iou

A rule is ``[GROUP:]WAY[:NUMBER]``; a group is written as for ``class_group`` (``all``, ``people-clothing``, ``rest``,
``bin:K``, a class id or name). The number is the IoU of ``nms``, the sigma of ``soft-nms``, the power of
``support-nms``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

Suppression = Literal["nms", "soft-nms", "support-nms"]
"""The ways: :mod:`retinaflow.detector.nms`."""

_NUMBERS = {"nms": "the IoU, in (0, 1]", "soft-nms": "sigma, above 0", "support-nms": "the power, above 0"}
_RULE = re.compile(rf"(?:(?P<group>.+?):)?(?P<way>{'|'.join(get_args(Suppression))})(?::(?P<number>[^:]*))?")


@dataclass(frozen=True)
class Rule:
    """One rule: which classes, which way, and its number (None: that of the settings or the default)."""

    group: str
    way: Suppression
    number: float | None


def read_rules(text: str) -> tuple[Rule, ...]:
    """The rules of a written setting. Raises ValueError naming the part that is none, and what would be one."""
    rules = tuple(_read(part.strip()) for part in text.split(","))
    groups = [rule.group for rule in rules]
    again = [group for group in groups if groups.count(group) > 1]
    if again:
        raise ValueError(f"a group must have one rule, but {again[0]} has {groups.count(again[0])}")
    if "all" in groups and len(groups) > 1:
        raise ValueError("a rule without a group is for all classes and must stand alone, but there are others beside")
    return rules


def _read(part: str) -> Rule:
    found = _RULE.fullmatch(part)
    if found is None:
        raise ValueError(
            f"a rule must be [GROUP:]WAY[:NUMBER] with one of the ways {', '.join(get_args(Suppression))} "
            f"(people-clothing:soft-nms,rest:nms:0.6), but one is {part or '(empty)'!r}"
        )
    way, number = cast(Suppression, found["way"]), found["number"]
    return Rule((found["group"] or "all").strip(), way, None if number is None else _number(way, number, part))


def _number(way: Suppression, written: str, part: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = float("nan")
    if not (value > 0 and (value <= 1 or (way != "nms" and value < float("inf")))):
        raise ValueError(f"the number of {way} is {_NUMBERS[way]}, but one is {written!r}, in {part!r}")
    return value
