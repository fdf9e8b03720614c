"""Given values -> complete settings: flags over a YAML file over defaults, ``auto`` filled in, every fault named.

``auto`` takes the value of a profile: ``demo`` for the generated set (small pictures, a small head, minutes on a
laptop), ``photos`` for anything else. Runs are logged with the values that were used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from retinaflow.config import TrackingSettings

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "image_size": 112,
        "num_buckets": 5,
        "fpn_channels": 64,
        "head_depth": 2,
        "anchor_scale": 3.0,
        "batch_size": 4,
        "epochs": 3,
        "lr": 1e-3,
        "eval_every": 3,
        "balance": 0.3,
    },
    "photos": {
        "image_size": 512,
        "num_buckets": 7,
        "fpn_channels": 256,
        "head_depth": 4,
        "anchor_scale": 4.0,
        "batch_size": 8,
        "epochs": 12,
        "lr": 3e-4,
        "eval_every": 1,
        "balance": 0.75,
    },
}
"""What ``auto`` stands for: ``demo`` when ``data=demo``, else ``photos``."""

ConfigType = TypeVar("ConfigType", bound=TrackingSettings)


def resolve(kind: type[ConfigType], given: Mapping[str, Any]) -> ConfigType:
    """Settings from given values (flags), over those of the YAML file ``config``, over the defaults; ``auto`` filled
    in.

    Raises ValueError naming each setting, its rule and its value.
    """
    values = {**_from_file(given.get("config")), **given}
    try:
        settings = kind.model_validate(values)
        profile = PROFILES["demo" if getattr(settings, "data", "demo") == "demo" else "photos"]
        # The published COCO detector has no norm in its heads; everything else starts its heads anew.
        head_norm = "none" if getattr(settings, "weights", None) == "coco" else "group"
        automatic = {**profile, "head_norm": head_norm}
        unset = {name: value for name, value in automatic.items() if getattr(settings, name, None) == "auto"}
        return kind.model_validate({**settings.model_dump(), **unset})
    except ValidationError as error:
        by_name: dict[str, list[Any]] = {}
        for item in error.errors():
            by_name.setdefault(str(item["loc"][0]), []).append(item)
        raise ValueError("\n".join(_explain(name, items) for name, items in by_name.items())) from None


def _from_file(path: Any) -> dict[str, Any]:
    if path is None or path == "none":
        return {}
    if str(path).startswith("runs:/"):
        # Here, as only this needs MLflow: settings are read before anything else is loaded.
        from retinaflow.tracking import fetch_file

        path = fetch_file(str(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"config={path}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={path}: not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config={path}: the file must map setting names to values, but holds {type(values).__name__}")
    return values


_KINDS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "string_type": "text",
}


def _explain(name: str, items: Sequence[Any]) -> str:
    """One message of the form "rule, but got name=value" from pydantic's errors about one setting."""
    # A setting of several types (a number or "auto") fails once per type; the first says most.
    item = items[0]
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name}, but got {name}={item['input']}; the command's --help lists those there are"
    limits = item.get("ctx", {})
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    rules = [f"{name} {signs[key]} {limits[key]:g} must hold" for key in signs if key in limits]
    if item["type"] == "literal_error":
        rules = [f"{name} must be {limits['expected']}"]
    elif item["type"] in _KINDS:
        words = [other["ctx"]["expected"] for other in items[1:] if other["type"] == "literal_error"]
        rules = [f"{name} must be {' or '.join([_KINDS[item['type']], *words])}"]
    elif item["type"] == "too_short":
        rules = [f"{name} must hold at least one value"]
    rule = rules[0] if rules else f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}"
    return f"{rule}, but got {name}={item['input'] if item['input'] not in ('', ()) else '(empty)'}"
