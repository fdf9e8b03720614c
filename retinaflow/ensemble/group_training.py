"""The trainings of ``split``: one for each group of classes, taken from an earlier split where one has finished."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import retinaflow
from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError
from retinaflow.metric.chosen_metric import OF_CLASS
from retinaflow.runs import store
from retinaflow.settings.commands import SplitConfig, TrainConfig
from retinaflow.settings.value_types import metric_target, metric_weights
from retinaflow.training.resume import WITHOUT_EFFECT, find_resumed

TRAINING_TAG = "retinaflow.training"
"""Tag of a group's training: :func:`training_key`."""
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
        ("register_as", "a merged model cannot be registered; register the parts by train or promote"),
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


def run_name(group: str) -> str:
    """A short name for the run and the folder of a group; different groups get different names."""
    name = re.sub(r"[^\w.,:-]+", "_", group)
    digest = hashlib.sha256(group.encode()).hexdigest()[:6]
    return name if len(name) <= _LONGEST_NAME and name == group else f"{name[:_LONGEST_NAME]}-{digest}"


def training_key(config: TrainConfig, data_digest: str) -> str:
    """Digest of everything that a training depends on: settings, data, version."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in WITHOUT_EFFECT}
    document = json.dumps([settings, data_digest, retinaflow.__version__], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EarlierTraining:
    """A training of the same settings and data: ``finished``, or else ``stopped`` and resumable; None for neither."""

    finished: str | None = None
    stopped: str | None = None


def earlier_training(key: str, config: TrainConfig) -> EarlierTraining:
    """The newest training with the tag ``key``."""
    runs = store.find_runs(f"tags.`{TRAINING_TAG}` = '{key}'")
    finished = next((run.run_id for run in runs if run.status == "FINISHED"), None)
    return EarlierTraining(finished, None if finished else _stopped(runs, config))


def _stopped(earlier: Sequence[store.RunRecord], config: TrainConfig) -> str | None:
    """The newest training that was stopped and can be resumed.

    A training that runs now and one that was killed at once have the same status, so both are left alone.
    """
    ended = (run.run_id for run in earlier if run.status in ("KILLED", "FAILED"))
    return next((run_id for run_id in ended if _is_resumable(run_id, config)), None)


def _is_resumable(run_id: str, config: TrainConfig) -> bool:
    try:
        return find_resumed(config.model_copy(update={"resume": run_id})) is not None
    except (SettingError, DataError, OSError):
        # It ended before its first checkpoint, or that is gone.
        return False
