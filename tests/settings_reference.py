"""The list of settings, ``docs/settings.md``, made from the settings classes of the commands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.data_settings import Settings

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Data": ("convert", "download", "explore", "binning"),
    "Training": ("main", "train", "search", "split"),
    "Results": ("evaluate", "compare", "promote", "merge"),
    "Use": ("predict", "visualize", "export"),
}
"""The four groups of commands, as the README has them."""

INTRODUCTION = """# Settings

Every setting of every command, generated from the code. A setting has the same name as flag (`--name`), as MLflow
parameter (`-P`) and as YAML key (`config=FILE`). Lists are separated by commas. `auto` depends on the data and on
other settings ([training](training.md#defaults)).
"""


def settings_reference() -> str:
    """The whole document: a table for each group of commands."""
    return "\n".join([INTRODUCTION, *(_section(title, names) for title, names in GROUPS.items())])


def meaning_of(kind: type[Settings], setting: str) -> str:
    """The text of a setting, with what auto stands for."""
    rule = kind.auto_of(setting) if kind.default_text(setting) == "auto" else None
    text = " ".join((kind.model_fields[setting].description or "").split())
    return f"{text.rstrip('.')}; auto: {rule.text}." if rule else text


def _section(title: str, names: tuple[str, ...]) -> str:
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for command in names:
        for setting, field in COMMANDS[command].model_fields.items():
            if field.exclude:
                continue
            kind = ", ".join(dict.fromkeys(_kinds(field.annotation))) + _range(field.metadata)
            row = (setting, kind, COMMANDS[command].default_text(setting), meaning_of(COMMANDS[command], setting))
            rows.setdefault(row, []).append(command)
    lines = [
        f"## {title}: " + ", ".join(names),
        "",
        "| setting | values | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for (setting, kind, default, meaning), commands in rows.items():
        only = "" if len(commands) == len(names) else f" ({', '.join(commands)})"
        meaning = re.sub(r"`+", "`", meaning).replace("|", "\\|")
        lines.append(f"| `{setting}`{only} | {kind} | `{default}` | {meaning} |")
    return "\n".join([*lines, ""])


def _kinds(annotation: Any) -> Iterator[str]:
    """The words for a type: choices as they are written, ``whole number``, ``list of numbers``, ..."""
    plain = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`none`"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in plain:
        yield plain[annotation]
    elif origin is Literal:
        yield from (f"`{choice}`" for choice in arguments)
    elif origin is tuple:
        yield "list of " + ", ".join(
            word + "s" if word in ("number", "path", "text") else word for word in _kinds(arguments[0])
        )
    elif hasattr(annotation, "__metadata__"):
        (first, *_), limits = arguments, _range(annotation.__metadata__)
        yield from (word + limits for word in _kinds(first))
    elif arguments:
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield "path" if getattr(annotation, "__name__", "") == "Path" else "text"


def _range(metadata: Any) -> str:
    """The limits in a field's metadata, such as `` >= 0 <= 1``."""
    limits: dict[str, Any] = {}
    for item in metadata:
        for part in (item, *getattr(item, "metadata", ())):
            limits |= {name: getattr(part, name) for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}
    if "lt" in limits:
        limits.pop("le", None)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(f" {signs[name]} {value:g}" for name, value in limits.items())
