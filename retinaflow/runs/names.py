"""What a run is called and how it is described, where nobody has named it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinaflow.runs.datasets import DatasetInput
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.value_types import FREE, as_text

_WITHOUT_NAME = ("sampling", "loss", "backbone", "optimizer", "class_group", "bin_strategy")
"""Settings whose value is understood without their name."""
_NOT_NAMED = ("from_run", "runs", "predictions", "seed")
_MOST = 5
"""Settings in a name."""


def run_name(command: str, config: TrackingSettings) -> str:
    """The settings that were given and differ from the defaults: ``uniform, focal_gamma 1.5, seed 3``.

    Settings that have no effect on the result, such as paths, are left out. A name begins with the command, unless it
    is ``train``.
    """
    kind = type(config)
    given = {name for name in config.model_fields_set if FREE not in kind.model_fields[name].metadata}
    data = {"data": config.data} if hasattr(config, "data") else {}
    defaults = kind(**data)
    names = [name for name in kind.model_fields if name in given and name not in _NOT_NAMED]
    changed = [name for name in names if getattr(config, name) != getattr(defaults, name)]
    parts = [_part(name, getattr(config, name)) for name in changed[:_MOST]]
    parts += [f"{len(changed) - _MOST} more"] if len(changed) > _MOST else []
    parts += [f"seed {config.seed}"] if config.seed != defaults.seed else []
    text = ", ".join(parts)
    if command == "train":
        return text or "defaults"
    return f"{command} {text}".strip()


def _part(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    text = as_text(value)
    if "/" in text:
        text = Path(text).name
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return text if name in _WITHOUT_NAME else f"{name} {text}"


def is_generated(name: str) -> bool:
    """Whether MLflow has made a name up (``honorable-fly-18``), as it does when nobody gives one."""
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    words = name.split("-")
    return len(words) == 3 and words[0] in _GENERATOR_PREDICATES and words[1] in _GENERATOR_NOUNS and words[2].isdigit()


def description(
    metrics: Mapping[str, float],
    evaluated: DatasetInput,
    *,
    trained: DatasetInput | None = None,
    num_bins: int = 0,
    lines: tuple[str, ...] = (),
) -> str:
    """The description of a run that was evaluated, in Markdown: mAP and thirds, the data, and what else it is given."""
    thirds = [
        f"{name} {metrics[f'val/mAP_{name}']:.4f}"
        for name in ("rare", "common", "frequent")
        if f"val/mAP_{name}" in metrics
    ]
    first = f"**mAP {metrics['val/mAP']:.4f}**" if "val/mAP" in metrics else "**mAP cannot be measured**"
    first += f"; {', '.join(thirds)}" if thirds else ""
    first += f"; {num_bins} frequency bins" if num_bins else ""
    counts = evaluated.profile
    data = f"evaluated on {evaluated.name} ({counts['images']:,} images, {counts['boxes']:,} boxes)"
    if trained is not None:
        own = trained.profile
        data = (
            f"trained on {trained.name} ({own['images']:,} images, {own['boxes']:,} boxes, {own['classes']:,} "
            f"classes), {data}"
        )
    return "\n\n".join([first, f"{data[:1].upper()}{data[1:]}.", *lines])
