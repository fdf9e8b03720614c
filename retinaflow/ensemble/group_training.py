"""The class groups of ``split`` and the names of their trainings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import SettingError
from retinaflow.metric.chosen_metric import OF_CLASS
from retinaflow.settings.commands import SplitConfig
from retinaflow.settings.value_types import metric_target, metric_weights

_LONGEST_NAME = 40


def read_groups(text: str) -> list[str]:
    """``a+b,c+bin:1..3`` -> ``[a, "b,c", bin:1, bin:2, bin:3]``. Raises SettingError for an empty or repeated group."""
    groups: list[str] = []
    for part in (part.strip() for part in text.split("+")):
        bins = re.fullmatch(r"bin:(\d+)\.\.(\d+)", part)
        groups += [f"bin:{n}" for n in range(int(bins[1]), int(bins[2]) + 1)] if bins else [part]
    if len(groups) < 2 or not all(groups) or len(set(groups)) < len(groups):
        raise SettingError(f"groups must be two different class groups or more, joined by +, but got groups={text}")
    return groups


def refuse_settings(config: SplitConfig, groups: Sequence[str]) -> None:
    """Raises SettingError for settings that a split cannot take, or that leave nothing to compare with."""
    for name, rule in (
        ("class_group", "split makes the class groups from groups"),
        ("resume", "split resumes by itself when it is started again with the same settings"),
    ):
        given, default = getattr(config, name), SplitConfig.model_fields[name].default
        if given != default:
            raise SettingError(f"{rule}, but got {name}={given}")
    target = () if config.target is None else (metric_target(config.target)[0],)
    for name, metrics in (("keep_best", metric_weights(config.keep_best)), ("target", target)):
        own = [metric for metric in metrics if metric.startswith((OF_CLASS, "val/mAP_bin_"))]
        if own:
            raise SettingError(
                f"{name} must be a metric that every class group has, but got {own[0]}; val/mAP, its thirds and "
                "val/coco_AP are in all"
            )
    if config.with_all and config.from_run is not None:
        raise SettingError(f"with_all or from_run can be given, not both, but got from_run={config.from_run}")
    if config.calibration == "none" and not config.with_all and config.from_run is None:
        raise SettingError(
            "calibration=none leaves nothing to compare the merged models with; give from_run=ID or with_all=true "
            f"besides groups={'+'.join(groups)}"
        )


def refuse_other_data(config: SplitConfig, base: StoredMatches, evaluated: AnnotationIndex) -> None:
    """Raises SettingError unless ``base`` was evaluated on the images of the split. Call it before the training."""
    known = dict(zip(base.class_ids, base.ground_truth.classes, strict=True))
    here = ground_truth_digest(evaluated)
    same = all(known.get(mid, own) == own for mid, own in zip(evaluated.taxonomy.ids, here.classes, strict=True))
    if base.ground_truth.images != here.images or not same:
        raise SettingError(
            f"from_run={config.from_run} must have been evaluated on the images that the split is evaluated on, but it "
            "was evaluated on others, or with other annotations; evaluate it on these with evaluate and give that run"
        )


def folder_of_group(group: str) -> str:
    """A short name for the run and the folder of a group; different groups get different names. It has no comma and no
    plus, by which ``runs=`` is divided."""
    name = re.sub(r"[^\w.:-]+", "_", group)
    digest = hashlib.sha256(group.encode()).hexdigest()[:6]
    return name if len(name) <= _LONGEST_NAME and name == group else f"{name[:_LONGEST_NAME]}-{digest}"
