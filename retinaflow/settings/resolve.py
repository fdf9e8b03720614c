"""Given values -> complete settings: flags over a YAML file over the data folder's ``retinaflow.yaml`` over defaults,
``auto`` filled in, every fault named.

``auto`` takes the value of a profile: ``demo`` for the generated set (small pictures, a small head, minutes on a
laptop), ``photos`` for anything else. Runs are logged with the values that were used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from retinaflow.settings.groups import FOLDER_SETTINGS, DataSettings, TrackingSettings

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
        "balance": 0.5,
        "bin_rates": "step",
        # So few steps from scratch have no time to learn from hard pictures, or for gradients of the easy ones to fade.
        "balance_start": 0.0,
        "augment": 0.2,
        "rare_augment": 0.4,
        "focal_gamma": 1.0,
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
        "bin_rates": "smooth",
        "balance_start": 0.5,
        "augment": 0.5,
        "rare_augment": 0.8,
        "focal_gamma": 2.0,
    },
}
"""What ``auto`` stands for: ``demo`` when ``data=demo``, else ``photos``."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "coco": {"head_norm": "none", "p6_from": "p5", "fpn_channels": 256, "head_depth": 4, "anchor_scale": 4.0},
    "coco_v2": {"head_norm": "group", "p6_from": "c5", "fpn_channels": 256, "head_depth": 4, "anchor_scale": 4.0},
}
"""What ``auto`` stands for with the weights of a whole published detector: its own parts."""

FOLDER_FILE = "retinaflow.yaml"
"""Settings that come with a data folder."""

ConfigType = TypeVar("ConfigType", bound=TrackingSettings)


def resolve(kind: type[ConfigType], given: Mapping[str, Any]) -> ConfigType:
    """Settings from given values (flags), over those of the YAML file ``config``, over those of the data folder, over
    the defaults; ``auto`` filled in.

    Raises ValueError naming each setting, its rule and its value.
    """
    chosen = {**_from_file(given.get("config")), **given}
    values = {**of_folder(kind, chosen.get("data"), chosen), **chosen}
    try:
        settings = kind.model_validate(values)
        profile = PROFILES["demo" if getattr(settings, "data", "demo") == "demo" else "photos"]
        automatic = {**profile, **_by_other_settings({**profile, **_known(settings.model_dump())})}
        unset = {name: value for name, value in automatic.items() if getattr(settings, name, None) == "auto"}
        complete = kind.model_validate({**settings.model_dump(exclude_unset=True), **unset})
        # Which settings were given stays known: a resumed training takes the others from its checkpoint.
        return kind.model_construct(_fields_set=set(chosen), **dict(complete))
    except ValidationError as error:
        by_name: dict[str, list[Any]] = {}
        for item in error.errors():
            by_name.setdefault(str(item["loc"][0]), []).append(item)
        raise ValueError("\n".join(_explain(name, items) for name, items in by_name.items())) from None


def of_folder(kind: type[TrackingSettings], data: Any, chosen: Collection[str]) -> dict[str, Any]:
    """Settings that ``retinaflow.yaml`` in the data folder gives, and that are not ``chosen`` by flag or file.

    Raises ValueError for a file that holds anything but :data:`FOLDER_SETTINGS`.
    """
    path = Path(str(data)) / FOLDER_FILE
    if data in (None, "demo", "trained") or not issubclass(kind, DataSettings) or not path.is_file():
        return {}
    values = _from_file(path, what=str(path))
    for name, value in values.items():
        if name not in FOLDER_SETTINGS or (name in ("image_labels", "hierarchy") and value not in ("none", "auto")):
            raise ValueError(
                f"{path}: a data folder may give {', '.join(FOLDER_SETTINGS)}, and no paths, but got {name}={value}"
            )
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if name in kind.model_fields and name not in chosen}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != "auto"}


def _by_other_settings(known: Mapping[str, Any]) -> dict[str, Any]:
    """What ``auto`` stands for where that depends on other settings."""
    weights = known.get("weights", "none")
    automatic: dict[str, Any] = {
        # A head that starts anew trains better with a norm; a published detector brings its own parts.
        "head_norm": "group",
        "p6_from": "p5",
        **PUBLISHED.get(weights, {}),
        # A detector's batches are too small to estimate the statistics of a trained backbone anew.
        "batch_norm": "train" if weights == "none" else "frozen",
        "trainable_layers": 5 if weights == "none" else 3,
        "weight_decay": 1e-4 if known.get("optimizer") == "sgd" else 0.01,
    }
    if known.get("optimizer") == "sgd":
        # The published RetinaNets' 0.01 for 16 images, scaled with the images of a step (Goyal et al. 2017).
        automatic["lr"] = 0.01 * known["batch_size"] * known["accumulate"] / 16
    return automatic


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


def _from_file(path: Any, *, what: str | None = None) -> dict[str, Any]:
    what = what or f"config={path}"
    if path is None or path == "none":
        return {}
    if str(path).startswith("runs:/"):
        # Here, as only this needs MLflow: settings are read before anything else is loaded.
        from retinaflow.runs.store import fetch_file

        path = fetch_file(str(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what}: the file must map setting names to values, but holds {type(values).__name__}")
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
