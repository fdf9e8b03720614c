"""``split``: a model for each group of classes, merged and compared with one model for all classes."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from retinaflow.commands import merge, train
from retinaflow.comparison.chosen_runs import chosen_run
from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.comparison.stored_matches import StoredMatches, read_matches
from retinaflow.data.training_data import load_training_data
from retinaflow.ensemble.group_training import (
    read_groups,
    refuse_other_data,
    refuse_settings,
    run_name,
)
from retinaflow.ensemble.members import load_ensemble
from retinaflow.progress import report
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import MergeConfig, SplitConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.earlier_training import EarlierTraining, earlier_training, training_key
from retinaflow.training.fit_to_data import fit_to_data

ONE_MODEL, PLAIN, CALIBRATED = "one_model", "merged", "calibrated"
"""Columns of the comparison: one model for all classes, and the merged models without and with calibration."""
_SHARED = set(SplitConfig.model_fields) & set(MergeConfig.model_fields) - {"output", "calibration", "register_as"}
"""Settings that ``merge`` gets from ``split`` as they are."""


def run(config: SplitConfig) -> Comparison:
    """A parent run with a child for each group, one for each way of merging, and ``comparison.csv``.

    A group that an earlier split of the same settings, data and version has trained is not trained again, and a
    training that was stopped is resumed. Raises SettingError for settings that leave nothing to split or to compare.
    """
    groups = read_groups(config.groups)
    refuse_settings(config, groups)
    # One choice for all groups: models of other anchors or lengths would not be comparable.
    data = load_training_data(config)
    config = fit_to_data(config, data.train)
    base = None if config.from_run is None else chosen_run(config.from_run).stored
    with start_run("split", config, default_name="split") as parent:
        parent.log_params(config.model_dump())
        parent.log_json(config.model_dump(mode="json"), "config.json")
        parent.log_datasets(training_datasets(config.model_dump(), data))
        wanted = [*groups, *(["all"] if config.with_all else [])]
        runs = [_trained(config, group, base, count=f"{n} of {len(wanted)}") for n, group in enumerate(wanted, start=1)]
        parts = runs[: len(groups)]
        one_model = runs[-1] if config.with_all else config.from_run
        parent.set_tags({"retinaflow.parts": ",".join(parts)})
        comparison = compare_with_one_model(config, parts, one_model)
        table = table_with_names(comparison)
        parent.log_csv(table, "comparison.csv")
        parent.log_metrics(
            {f"val/{row['group']}": row[comparison.sides[-1].name] for row in table.to_dict("records")}, step=0
        )
        shown = table.to_string(index=False, float_format=lambda value: f"{value:.3f}")
        report(f"\nAP by frequency bin (bin 1 is the rarest); {_explained(comparison)}:\n{shown}")
        return comparison


def _trained(config: SplitConfig, group: str, base: StoredMatches | None, *, count: str) -> str:
    """The run (track=false: the folder) of the model of a group: an earlier one, or trained now."""
    settings = {name: getattr(config, name) for name in TrainConfig.model_fields}
    own = resolve(TrainConfig, {**settings, "class_group": group, "config": None, "register_as": None})
    report(f"\n{count}: {group}")
    data = load_training_data(own)
    if base is not None:
        refuse_other_data(config, base, data.evaluated)
    earlier = earlier_training(training_key(own, data.digest), own) if config.reuse else EarlierTraining(own)
    run_id = earlier.finished
    if run_id is not None:
        report(f"{run_id} has these settings and data and is finished; reuse=false trains it again")
    else:
        trained = train.run(earlier.config, data=data, name=run_name(group))
        assert trained is not None, "resume=auto is refused above"
        run_id = trained.run_id
    return run_id if config.track else str(config.output / run_id)


def compare_with_one_model(config: SplitConfig, parts: Sequence[str], one_model: str | None) -> Comparison:
    """Merge the parts without and with calibration; compare both with the one model, or with each other. The last merge
    leaves a model."""
    ensemble = load_ensemble(parts)
    sides = [] if one_model is None else [Side("A", ONE_MODEL, (chosen_run(one_model).stored,))]
    ways = {PLAIN: "none"} if config.calibration == "none" else {PLAIN: "none", CALIBRATED: config.calibration}
    shared = {name: getattr(config, name) for name in _SHARED}
    for name, calibration in ways.items():
        report(f"\n{name}: calibration={calibration}")
        is_last = name == list(ways)[-1]
        settings = {**shared, "runs": tuple(parts), "output": config.output / name, "calibration": calibration}
        settings["register_as"] = config.register_as if is_last else None
        result = merge.run(MergeConfig(**settings), ensemble=ensemble, name=name, with_model=is_last)
        matches = read_matches(result.run_id if config.track else str(config.output / name))
        sides.append(Side("ABC"[len(sides)], name, (matches,)))
    return compare_runs(sides, Resampling(resamples=config.bootstrap, seed=config.seed))


def table_with_names(comparison: Comparison) -> pd.DataFrame:
    """The comparison over groups of classes, with the names of its sides instead of their letters."""
    sides = comparison.sides
    columns = {"group": "group", "classes": "classes", sides[0].letter: sides[0].name}
    for side in sides[1:]:
        columns[side.letter] = side.name
        columns |= {f"{side.letter}_difference{end}": f"{side.name}_difference{end}" for end in ("", "_low", "_high")}
    return comparison.groups[list(columns)].rename(columns=columns)


def _explained(comparison: Comparison) -> str:
    first, left_out = comparison.sides[0].name, len(comparison.left_out)
    text = f"differences from {first} with their {comparison.resampling.confidence:.0%} intervals over images"
    return f"{text}; {left_out} classes that not all have are left out" if left_out else text
