"""``split``: a model for each group of classes, merged and compared with one model for all classes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import pandas as pd

import retinaflow
from retinaflow.commands import merge, train
from retinaflow.comparison.chosen_runs import chosen_run
from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.stored_matches import StoredMatches, read_matches
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import load_training_data
from retinaflow.ensemble.members import load_parts
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs import store, tracking
from retinaflow.runs.tracking import launched_by_mlflow
from retinaflow.settings.commands import MergeConfig, SplitConfig, TrainConfig
from retinaflow.settings.groups import MergeFields
from retinaflow.settings.resolve import resolve
from retinaflow.training.resume import WITHOUT_EFFECT, find_resumed

ONE_MODEL, PLAIN, CALIBRATED = "one_model", "merged", "calibrated"
"""Columns of the comparison: one model for all classes, and the merged models without and with calibration."""
_MOST_LETTERS = 40
_TRAINING = "retinaflow.training"
"""Tag of a group's training: :func:`training_key`."""


def run(config: SplitConfig) -> Comparison:
    """A parent run with a child for each group, one for each way of merging, and ``comparison.csv``.

    A group that an earlier split of the same settings, data and version has finished is not trained again, and one
    that was stopped goes on. Raises ValueError for settings that leave nothing to split or to compare with.
    """
    groups = read_groups(config.groups)
    _refuse(config, groups)
    base = None if config.from_run is None else chosen_run(config.from_run).stored
    with tracking.start_run("split", track=config.track, experiment=config.experiment, output=config.output) as parent:
        parent.log_params(config.model_dump())
        parent.log_json(config.model_dump(mode="json"), "config.json")
        wanted = [*groups, *(["all"] if config.with_all else [])]
        runs = [_trained(config, group, base, place=f"{n} of {len(wanted)}") for n, group in enumerate(wanted, start=1)]
        parts = runs[: len(groups)]
        one_model = runs[-1] if config.with_all else config.from_run
        parent.set_tags({"retinaflow.parts": ",".join(parts)})
        comparison = compare(config, parts, one_model)
        table = readable(comparison)
        parent.log_csv(table, "comparison.csv")
        parent.log_metrics(
            {f"val/{row['group']}": row[comparison.sides[-1].name] for row in table.to_dict("records")}, step=0
        )
        report(f"\nAP by frequency bin (bin 1 is the rarest); {_explained(comparison)}:\n{_shown(table)}")
        return comparison


def read_groups(text: str) -> list[str]:
    """``a+b,c+bin:1..3`` -> ``[a, "b,c", bin:1, bin:2, bin:3]``. Raises ValueError for an empty or repeated group."""
    groups: list[str] = []
    for part in (part.strip() for part in text.split("+")):
        bins = re.fullmatch(r"bin:(\d+)\.\.(\d+)", part)
        groups += [f"bin:{n}" for n in range(int(bins[1]), int(bins[2]) + 1)] if bins else [part]
    if len(groups) < 2 or not all(groups) or len(set(groups)) < len(groups):
        raise ValueError(f"groups must be two different class groups or more, joined by +, but got groups={text}")
    return groups


def compare(config: SplitConfig, parts: Sequence[str], one_model: str | None) -> Comparison:
    """Merge the parts without and with calibration; compare both with the one model, or with each other."""
    with StopRequest(watch_parent=launched_by_mlflow()) as stop:
        loaded = load_parts(parts, stop)
    sides = [(ONE_MODEL, one_model)] if one_model is not None else []
    ways = {PLAIN: "none"} if config.calibration == "none" else {PLAIN: "none", CALIBRATED: config.calibration}
    shared = {name: getattr(config, name) for name in (*MergeFields.model_fields, *_SHARED)}
    for name, calibration in ways.items():
        report(f"\n{name}: calibration={calibration}")
        settings = {**shared, "runs": tuple(parts), "output": config.output / name, "calibration": calibration}
        result = merge.run(MergeConfig(**settings), parts=loaded, name=name)
        sides.append((name, result.run_id if config.track else str(config.output / name)))
    kept = [
        Side(letter, name, (chosen_run(run).stored if name == ONE_MODEL else read_matches(run),))
        for letter, (name, run) in zip("ABC", sides, strict=False)
    ]
    return compare_runs(kept, Resampling(resamples=config.bootstrap, seed=config.seed))


_SHARED = ("track", "experiment", "seed", "nms_iou", "max_detections")


def readable(comparison: Comparison) -> pd.DataFrame:
    """The comparison over groups of classes, with the names of its sides instead of letters."""
    sides = comparison.sides
    columns = {"group": "group", "classes": "classes", sides[0].letter: sides[0].name}
    for side in sides[1:]:
        columns[side.letter] = side.name
        columns |= {f"{side.letter}_difference{end}": f"{side.name}_difference{end}" for end in ("", "_low", "_high")}
    return comparison.groups[list(columns)].rename(columns=columns)


def _refuse(config: SplitConfig, groups: Sequence[str]) -> None:
    for name, rule in (
        ("class_group", "split makes the class groups from groups"),
        ("resume", "split goes on by itself when it is given the same settings again"),
        ("register_as", "a merged model cannot be registered; register the parts by train or promote"),
    ):
        given, default = getattr(config, name), SplitConfig.model_fields[name].default
        if given != default:
            raise ValueError(f"{rule}, but got {name}={given}")
    if config.with_all and config.from_run is not None:
        raise ValueError(f"with_all or from_run can be given, not both, but got from_run={config.from_run}")
    if config.calibration == "none" and not config.with_all and config.from_run is None:
        raise ValueError(
            "calibration=none leaves nothing to compare the merged models with; give from_run=ID or with_all=true "
            f"besides groups={'+'.join(groups)}"
        )


def _trained(config: SplitConfig, group: str, base: StoredMatches | None, *, place: str) -> str:
    """The run (track=false: the folder) of the model of a group: an earlier one, or trained now."""
    settings = {name: getattr(config, name) for name in TrainConfig.model_fields}
    own = resolve(TrainConfig, {**settings, "class_group": group, "config": None})
    report(f"\n{place}: {group}")
    data = load_training_data(own)
    if base is not None:
        _refuse_other_base(config, base, data.evaluated)
    key, name = training_key(own, data.digest), run_name(group)
    if config.track and config.reuse:
        earlier = store.find_runs(f"tags.`{_TRAINING}` = '{key}'")
        finished = next((run.run_id for run in earlier if run.status == "FINISHED"), None)
        if finished is not None:
            report(f"run {finished} of an earlier split has these settings and data; reuse=false trains it again")
            return finished
        stopped = _stopped(earlier, own)
        if stopped is not None:
            report(f"run {stopped} of an earlier split was stopped and goes on; reuse=false trains anew")
            own = own.model_copy(update={"resume": stopped})
    run_id = train.run(own, data=data, name=name, tags={_TRAINING: key}).run_id
    return run_id if config.track else str(config.output / name)


def run_name(group: str) -> str:
    """A group as the name of a run and a folder: of few letters, others for every group."""
    name = re.sub(r"[^\w.,:-]+", "_", group)
    digest = hashlib.sha256(group.encode()).hexdigest()[:6]
    return name if len(name) <= _MOST_LETTERS and name == group else f"{name[:_MOST_LETTERS]}-{digest}"


def _refuse_other_base(config: SplitConfig, base: StoredMatches, evaluated: AnnotationIndex) -> None:
    """Better now than after hours of training."""
    known = dict(zip(base.class_ids, base.ground_truth.classes, strict=True))
    here = ground_truth_digest(evaluated)
    same = all(known.get(mid, own) == own for mid, own in zip(evaluated.taxonomy.ids, here.classes, strict=True))
    if base.ground_truth.images != here.images or not same:
        raise ValueError(
            f"from_run={config.from_run} must have been evaluated on the images that the split is evaluated on, but it was "
            "evaluated on others, or with other annotations; evaluate it on these with evaluate and give that run"
        )


def training_key(config: TrainConfig, data_digest: str) -> str:
    """Digest of all that decides a training: settings, data, version."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in WITHOUT_EFFECT}
    document = json.dumps([settings, data_digest, retinaflow.__version__], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def _stopped(earlier: Sequence[store.RunRecord], config: TrainConfig) -> str | None:
    """The newest training that was stopped and can go on. One that runs and one that was killed without a word look
    alike, and are left alone."""
    ended = (run.run_id for run in earlier if run.status in ("KILLED", "FAILED"))
    return next((run_id for run_id in ended if _can_go_on(run_id, config)), None)


def _can_go_on(run_id: str, config: TrainConfig) -> bool:
    try:
        return find_resumed(config.model_copy(update={"resume": run_id})) is not None
    except (ValueError, OSError):
        # It ended before its first checkpoint, or that is gone.
        return False


def _explained(comparison: Comparison) -> str:
    first = comparison.sides[0].name
    text = f"differences from {first} with their {comparison.resampling.confidence:.0%} intervals over images"
    left_out = comparison.left_out
    return f"{text}; {len(left_out)} classes that not all have are left out" if left_out else text


def _shown(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.3f}")
