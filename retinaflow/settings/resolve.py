"""Given values -> complete settings: flags over a YAML file over the data folder's ``retinaflow.yaml`` over defaults,
checked once; every error names the setting, its rule and its value.

A setting by an earlier name (:data:`RENAMED`) is accepted for one version, with a message.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from retinaflow.errors import DataError, SettingError, shown
from retinaflow.files import read_yaml
from retinaflow.progress import report
from retinaflow.settings.data_settings import FOLDER_SETTINGS, DataSettings, Settings, TrackingSettings
from retinaflow.settings.value_types import as_text

RENAMED: Mapping[str, str] = {
    "background_rate": "empty_image_rate",
    "image_sizes": "size_table",
    "min_truths": "min_ground_truth",
    "truth": "ground_truth",
    "validation_share": "validation_fraction",
    "voc_difficult": "difficult",
}
"""Earlier name -> name of a setting, for flags, ``-P``, YAML files and checkpoints."""

FOLDER_FILE = "retinaflow.yaml"
"""Settings that come with a data folder."""

_SHOWN = 20
"""Refused settings that a message names; the others are counted."""

_PLAIN = re.compile(r"\w[\w .-]*")

ConfigType = TypeVar("ConfigType", bound=Settings)


def resolve(
    kind: type[ConfigType], given: Mapping[str, Any], *, fetch: Callable[[str], Path] | None = None
) -> ConfigType:
    """Settings from given values (flags), over those of the YAML file ``config``, over those of the data folder, over
    the defaults. ``model_fields_set`` names those that were given, the folder's not among them.

    ``fetch`` brings the file of a ``config`` that lies with a run (runs:/...). Raises SettingError for each setting
    that breaks a rule, and DataError for a file that cannot be read.
    """
    given = current_names(given)
    chosen = {**current_names(_from_config(given.get("config"), fetch)), **given}
    folder = of_folder(kind, chosen.get("data"), chosen)
    settings = _checked(kind, {**folder, **chosen})
    # Which settings were given stays known: a resumed training takes the others from its checkpoint.
    settings.model_fields_set.difference_update(folder)
    return settings


def changed(settings: ConfigType, values: Mapping[str, Any]) -> ConfigType:
    """A copy with other values, checked; ``model_fields_set`` stays. Raises SettingError."""
    copy = _checked(type(settings), {**dict(settings), **values})
    return type(settings).model_construct(set(settings.model_fields_set), **dict(copy))


def _checked(kind: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = _explained(kind, error)
        more = [f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
        raise SettingError("\n".join(lines[:_SHOWN] + more)) from None


def refuse_without_effect(settings: Settings, names: Iterable[str], *, beside: str) -> None:
    """Raise SettingError for one of these that is given, other than its default: ``beside`` (NAME=VALUE) it would have
    no effect."""
    defaults = type(settings)()
    for name in names:
        value = getattr(settings, name)
        if name in settings.model_fields_set and value != getattr(defaults, name):
            raise SettingError(f"{name} has no effect beside {beside}, but got {name}={as_text(value)}; leave it out")


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the names that settings have now. Prints each name that changed."""
    renamed = [name for name in values if name in RENAMED]
    for name in renamed:
        if RENAMED[name] in values:
            raise SettingError(f"{name} is the earlier name of {RENAMED[name]}, but both are given; leave {name} out")
        report(f"{name} is now called {RENAMED[name]}; the earlier name is accepted for one more version")
    return {RENAMED.get(name, name): value for name, value in values.items()}


def of_folder(kind: type[Settings], data: Any, chosen: Collection[str]) -> dict[str, Any]:
    """Settings that ``retinaflow.yaml`` in the data folder gives, and that are not ``chosen`` by flag or file.

    Raises DataError for a file that holds anything but :data:`FOLDER_SETTINGS`.
    """
    path = Path(str(data)) / FOLDER_FILE
    if data in (None, "demo", "trained") or not issubclass(kind, DataSettings) or not path.is_file():
        return {}
    values = _from_file(path, what=str(path))
    for name, value in values.items():
        if name not in FOLDER_SETTINGS or (name in ("image_labels", "hierarchy") and value not in ("none", "auto")):
            raise DataError(
                f"{path}: a data folder may give {', '.join(FOLDER_SETTINGS)}, and no paths, but got "
                f"{shown(name, quotes=False)}={shown(value, quotes=False)}"
            )
        if name in ("train_splits", "eval_split") and not _are_plain(value):
            # A file of the folder must not point out of it.
            raise DataError(f"{path}: a split must be a plain name, but got {name}={shown(value, quotes=False)}")
        values = {**values, name: str(value)} if name == "eval_split" else values
    values = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if name in kind.model_fields and name not in chosen}


def _are_plain(splits: Any) -> bool:
    words = splits if isinstance(splits, list) else str(splits).split(",") if isinstance(splits, str | int) else []
    return bool(words) and all(isinstance(word, str | int) and _PLAIN.fullmatch(str(word).strip()) for word in words)


def with_absolute_paths(settings: TrackingSettings) -> dict[str, Any]:
    """The settings as JSON values, paths made absolute, so that they mean the same in any folder."""
    values = settings.model_dump(mode="json")
    for name, value in settings:
        if isinstance(value, Path):
            values[name] = str(value.absolute())
        elif isinstance(value, tuple):
            values[name] = [str(item.absolute()) if isinstance(item, Path) else item for item in value]
        elif isinstance(value, str) and (
            (name in ("data", "hierarchy") and value not in ("demo", "trained", "auto", "none"))
            or (name in ("weights", "class_group", "config") and Path(value).is_file())
        ):
            values[name] = str(Path(value).absolute())
    return values


def nearest(word: str, words: Iterable[str]) -> str:
    """``; did you mean WORD?`` for the most similar of some words; empty when none is."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _from_config(config: Any, fetch: Callable[[str], Path] | None) -> dict[str, Any]:
    if config is None or config == "none":
        return {}
    path = fetch(str(config)) if fetch is not None and str(config).startswith("runs:/") else Path(str(config))
    return _from_file(path, what=f"config={config}")


def _from_file(path: Path, *, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise SettingError(f"{what}: no such file")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise DataError(f"{what}: the file must map setting names to values, but holds {type(values).__name__}")
    return values


_KINDS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "string_type": "text",
}


def _explained(kind: type[Settings], error: ValidationError) -> list[str]:
    """One line per setting that breaks a rule."""
    by_name: dict[str, list[Any]] = {}
    for item in error.errors():
        # What depends on a value that is refused is not an error of its own.
        if item["type"] != "default_factory_not_called":
            by_name.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
    return [_explain(kind, name, items) for name, items in by_name.items()]


def _explain(kind: type[Settings], name: str, items: Sequence[Any]) -> str:
    """One message of the form "rule, but got name=value" from pydantic's errors about one setting."""
    # A setting of several types (a number or "trained") fails once per type; the first error is the clearest.
    item = items[0]
    limits = item.get("ctx", {})
    if not name:
        return str(limits.get("error", item["msg"]))
    if item["type"] == "extra_forbidden":
        hint = nearest(name, kind.model_fields) or "; the command's --help lists the settings"
        return f"there is no setting {name}, but got {name}={shown(item['input'], quotes=False)}{hint}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    rules = [f"{name} {signs[key]} {limits[key]:g} must hold" for key in signs if key in limits]
    hint = ""
    if item["type"] == "literal_error":
        rules = [f"{name} must be {limits['expected']}"]
        hint = nearest(str(item["input"]), limits["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    elif item["type"] in _KINDS:
        words = [other["ctx"]["expected"] for other in items[1:] if other["type"] == "literal_error"]
        words += ["'auto'"] if kind.auto_of(name) else []
        rules = [f"{name} must be {' or '.join([_KINDS[item['type']], *words])}"]
    elif item["type"] == "too_short":
        rules = [f"{name} must hold at least one value"]
    elif item["type"] in ("rule", "no_such_name"):
        rules = [item["msg"]]
        hint = nearest(str(item["input"]), limits.get("known", ()))
    rule = rules[0] if rules else f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}"
    given = shown(item["input"], quotes=False) if item["input"] not in ("", ()) else "(empty)"
    return f"{rule}, but got {name}={given}{hint}"
