"""How the settings of a command are shown: in sections by subject, each with its choices or type and its default."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from retinaflow.settings.data_settings import Settings
from retinaflow.settings.resolve import RENAMED, nearest
from retinaflow.settings.value_types import as_text

MAIN_SECTION = "Main settings"
_PLAIN: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT", bool: "true|false", type(None): "none"}
_HELP_COLUMN = 30

_TRAINING = (
    *("data", "class_group", "backbone", "weights", "image_size", "batch_size", "epochs", "lr", "sampling", "num_bins"),
    *("balance", "augment", "rare_augment", "copy_paste", "focal_gamma", "loss"),
)
MAIN_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "main": (*_TRAINING, "seed"),
    "binning": ("data", "train_splits", "class_group", "sampling", "bin_strategy", "num_bins", "balance"),
    "train": (*_TRAINING, "seed", "resume", "register_as"),
    "evaluate": ("from_run", "predictions", "data", "eval_split", "image_size", "iou_thresholds", "bootstrap"),
    "predict": ("from_run", "data", "split", "images", "image_list", "output", "file_format", "submission", "nproc"),
    "visualize": ("from_run", "predictions", "data", "split", "images", "ids", "samples", "min_score", "output"),
    "export": ("from_run", "output"),
    "explore": ("data", "train_splits", "class_group", "num_bins", "samples", "output"),
    "compare": ("runs", "filter", "from_experiment", "bootstrap", "confidence", "output"),
    "promote": ("runs", "filter", "register_as", "alias", "force", "confidence"),
    "search": (
        *("data", "study", "trials", "objective", "seeds", "confirm_seeds", "search_workers", "storage", "dry_run"),
        *("epochs", "sampling", "num_bins", "balance", "augment", "rare_augment", "copy_paste", "focal_gamma"),
        *("loss", "lr"),
    ),
    "convert": ("data", "output", "to", "exhaustive", "validation_fraction", "image_files"),
    "download": ("class_group", "per_class", "image_ids", "splits", "output", "dry_run"),
    "merge": (
        *("runs", "calibration", "calibrators", "fusion_iou", "expand_predictions", "max_detections", "register_as"),
        "output",
    ),
    "split": ("groups", "from_run", "with_all", "reuse", *_TRAINING, "calibration", "register_as"),
}
"""The settings of each command that matter first: help begins with them, and comments in MLproject name them."""


class SettingsParser(argparse.ArgumentParser):
    """A parser that names the nearest flag or command where one does not exist, and shows short usage."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown flag is an error of its command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._no_such_flag(getattr(found, "command", None), unknown[0].split("=")[0])
        return found

    def _no_such_flag(self, command: str | None, flag: str) -> NoReturn:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and command is not None:
                action.choices[command]._no_such_flag(None, flag)
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        self.error(f"there is no {flag}{nearest(flag, flags)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            self.error(f"there is no command {value}{nearest(str(value), action.choices)}")


def add_settings(parser: argparse.ArgumentParser, kind: type[Settings], first: Sequence[str]) -> None:
    """One flag per setting, in sections; the settings named in ``first`` come before all others."""
    parser.formatter_class = _formatter
    sections: dict[str, list[str]] = {MAIN_SECTION: list(first)}
    for name, field in kind.model_fields.items():
        if name not in first and not field.exclude:
            sections.setdefault(kind.declared_in(name).title, []).append(name)
    for title, names in sections.items():
        section = parser.add_argument_group(title)
        for name in names:
            text = setting_text(kind, name).replace("%", "%%")
            section.add_argument(f"--{name}", metavar=_metavar(kind, name), default=argparse.SUPPRESS, help=text)
    for old, new in RENAMED.items():
        if new in kind.model_fields:
            parser.add_argument(f"--{old}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def setting_text(kind: type[Settings], name: str) -> str:
    """Meaning and default of a setting."""
    rule = kind.auto_of(name)
    default = kind.default_text(name)
    shown = f"default: {default}"
    if rule and default == "auto":
        shown = f"auto: {rule.text}"
    elif rule or default != as_text(kind.model_fields[name].default):
        shown = f"searched: {default}"
    return f"{(kind.model_fields[name].description or '').rstrip('.')} ({shown})"


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=_HELP_COLUMN)


def _metavar(kind: type[Settings], name: str) -> str:
    words = list(dict.fromkeys(_words(kind.model_fields[name].annotation)))
    return "|".join(words)


def _words(annotation: Any) -> Iterator[str]:
    """The choices or the kind of value of a type: ``nms``, ``soft-nms``; ``N``; ``PATH,...``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        yield _PLAIN[annotation]
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin is tuple:
        words = list(_words(arguments[0]))
        yield "|".join(words) + ",..."
    elif origin is Annotated:
        yield from _words(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _words(argument)
    else:
        yield "PATH"
