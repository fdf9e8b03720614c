"""Settings -> the runs to compare, with their matches, grouped into sides: runs of a side differ in their seed only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.comparison.comparison import LETTERS, Side
from retinaflow.comparison.stored_matches import FILE_NAME, StoredMatches, read_matches
from retinaflow.errors import SettingError
from retinaflow.runs import store
from retinaflow.runs.datasets import training_digest
from retinaflow.runs.run import tags_of_folder
from retinaflow.runs.store import RunRecord
from retinaflow.settings.commands import ABOUT_DATA, WITHOUT_EFFECT
from retinaflow.settings.model_settings import ComparisonSettings
from retinaflow.settings.resolve import refuse_without_effect
from retinaflow.settings.value_types import as_text

TRAINING_DATA = "(training data)"
NAME_SETTINGS = 3
PREDICTIONS = "predictions"
"""Setting of an evaluation of a file."""


@dataclass(frozen=True)
class ChosenRun:
    """A run of the store, or a folder (``record.experiment_id`` is empty), and its matches."""

    record: RunRecord
    stored: StoredMatches

    @property
    def seed(self) -> str:
        """Seed of its training."""
        return str(self.stored.settings.get("seed", "–"))

    @property
    def settings(self) -> dict[str, str]:
        """The settings that affect its score, as written on the command line, without its seed and its data."""
        left_out = {*WITHOUT_EFFECT, "seed"}
        return {name: _text(value) for name, value in self.stored.settings.items() if name not in left_out}

    @property
    def choice_of_data(self) -> dict[str, str]:
        """The settings by which its training has chosen its data; the digest tells whether it is the same."""
        names = [name for name in self.stored.settings if name in WITHOUT_EFFECT & ABOUT_DATA]
        return {name: _text(self.stored.settings[name]) for name in names}

    @property
    def training_data(self) -> dict[str, str]:
        """The digest of what its model was trained on, by :data:`TRAINING_DATA`; empty where that is not known."""
        digest = training_digest(self.record.tags)
        return {TRAINING_DATA: digest} if digest else {}

    @property
    def about(self) -> str:
        """When it was started, and the commit."""
        tags = self.record.tags
        commit = tags.get("retinaflow.commit", "")[:7]
        changed = " with changes" if tags.get("retinaflow.dirty") == "true" else ""
        made = f"{datetime.fromtimestamp(self.record.started / 1000):%Y-%m-%d %H:%M}" if self.record.started else ""
        return ", ".join(part for part in (made, f"commit {commit}{changed}" if commit else "") if part)


def chosen_runs(config: ComparisonSettings) -> list[list[ChosenRun]]:
    """The runs of each setting, in the order given or, when found by a filter, oldest first.

    Raises SettingError for runs that do not exist, are named twice, or are joined but differ in more than their seed;
    DataError for runs without matches.
    """
    if config.runs:
        sides = _named(config)
        for side in sides:
            _refuse_mixed(side)
        return sides
    return _pooled(_found(config, fewest=2))


def candidates(config: ComparisonSettings) -> list[ChosenRun]:
    """The runs one by one, of whatever settings. Errors as in :func:`chosen_runs`; one run is enough."""
    return [run for side in _named(config) for run in side] if config.runs else _found(config, fewest=1)


def _named(config: ComparisonSettings) -> list[list[ChosenRun]]:
    if config.filter is not None:
        raise SettingError(f"runs or filter can be given, not both, but got filter={config.filter}")
    refuse_without_effect(config, ["from_experiment"], beside=f"runs={','.join(config.runs)}")
    sides = [[chosen_run(name.strip()) for name in group.split("+") if name.strip()] for group in config.runs]
    ids = [run.record.run_id for side in sides for run in side]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise SettingError(f"each run can be given once, but got twice: {', '.join(twice)}")
    if not all(sides):
        raise SettingError("runs must name at least one run between commas, but got an empty name")
    return sides


def as_sides(chosen: Sequence[Sequence[ChosenRun]]) -> list[Side]:
    """The sides, named by the settings in which they differ, or by their runs where none does. Beside a file of
    predictions, of which no other setting is known, a model has the name of its run."""
    if len(chosen) > len(LETTERS):
        raise SettingError(
            f"up to {len(LETTERS)} settings can be compared, but got {len(chosen)}; narrow runs or filter"
        )
    table = differing_settings(chosen).set_index("setting")
    shown = [name for name in table.index if not name.startswith("(")]
    shown = [PREDICTIONS] if PREDICTIONS in shown else shown[:NAME_SETTINGS]
    files = {setting: _file_names(table.loc[setting].tolist()) for setting in shown}
    sides = []
    for letter, runs in zip(LETTERS, chosen, strict=False):
        by_settings = ", ".join(f"{setting}={files[setting][table[letter][setting]]}" for setting in shown)
        if PREDICTIONS in shown and PREDICTIONS not in runs[0].settings:
            by_settings = ""
        name = by_settings or " + ".join(run.record.name for run in runs)
        sides.append(Side(letter, name, tuple(run.stored for run in runs)))
    return sides


def _file_names(values: Sequence[str]) -> dict[str, str]:
    """Each value as it is shown: the last part of a path, where the values are different without the others."""
    names = {value: Path(value).name if Path(value).is_absolute() else value for value in values}
    return names if len(set(names.values())) == len(names) else {value: value for value in values}


def differing_settings(chosen: Sequence[Sequence[ChosenRun]]) -> pd.DataFrame:
    """``setting``, then a column per letter: the settings, the training data and the device where they differ."""
    columns = [runs[0].settings | _circumstances(runs[0]) for runs in chosen]
    if len({column[TRAINING_DATA] for column in columns if TRAINING_DATA in column}) > 1:
        columns = [runs[0].choice_of_data | column for runs, column in zip(chosen, columns, strict=True)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[column.get(name, "–") for column in columns] for name in names]
    rows_that_differ = [[name, *row] for name, row in zip(names, rows, strict=True) if len(set(row)) > 1]
    return pd.DataFrame(rows_that_differ, columns=["setting", *LETTERS[: len(chosen)]])


def _circumstances(run: ChosenRun) -> dict[str, str]:
    """What is no setting but can affect the score."""
    tags = run.record.tags
    found = {"(device)": tags.get("retinaflow.device"), "(arithmetic)": tags.get("retinaflow.precision")}
    found["(code)"] = tags.get("retinaflow.commit", "")[:7] or None
    return {name: value for name, value in found.items() if value} | run.training_data


def chosen_run(name: str) -> ChosenRun:
    """A run by id or name, or a folder written with track=false. Errors as in :func:`chosen_runs`."""
    folder = Path(name)
    if (folder / FILE_NAME).is_file():
        record = RunRecord(name, folder.name, "", "FINISHED", 0, tags_of_folder(folder), {})
        return ChosenRun(record, read_matches(name))
    record = store.find_run(name)
    return ChosenRun(record, read_matches(record.run_id))


def called(run: ChosenRun) -> str:
    """The run as messages name it."""
    record = run.record
    return f"run {record.name} ({record.run_id})" if record.experiment_id else f"run {record.run_id}"


def _found(config: ComparisonSettings, *, fewest: int) -> list[ChosenRun]:
    """Runs by filter, oldest first; without a filter the two last trainings."""
    parts = ["attributes.status = 'FINISHED'", *([config.filter] if config.filter else [])]
    if "retinaflow.command" not in (config.filter or ""):
        parts.append("tags.`retinaflow.command` = 'train'")
    found = store.find_runs(" and ".join(parts), experiment=config.from_experiment, most=1000 if config.filter else 2)
    if len(found) < fewest:
        what = f"filter={config.filter} finds" if config.filter else f"{store.uri()} has"
        needed = "two finished trainings are" if fewest > 1 else "a finished training is"
        raise SettingError(f"{needed} needed, but {what} {len(found)}; name runs as runs={','.join(['ID'] * fewest)}")
    return [ChosenRun(record, read_matches(record.run_id)) for record in reversed(found)]


def _pooled(runs: Sequence[ChosenRun]) -> list[list[ChosenRun]]:
    sides: dict[str, list[ChosenRun]] = {}
    for run in runs:
        sides.setdefault(json.dumps(run.settings | run.training_data, sort_keys=True), []).append(run)
    if len(sides) == 1 and len(runs) == 2:
        return [[run] for run in runs]
    if len(sides) == 1:
        raise SettingError(f"two settings are needed, but the {len(runs)} runs found differ in their seed only")
    return list(sides.values())


def _refuse_mixed(side: Sequence[ChosenRun]) -> None:
    first = side[0]
    for run in side[1:]:
        ours, theirs = first.settings | first.training_data, run.settings | run.training_data
        # What a run of an earlier version was trained on is not known.
        names = {*ours, *theirs} - ({TRAINING_DATA} if not first.training_data or not run.training_data else set())
        different = sorted(name for name in names if ours.get(name) != theirs.get(name))
        if different:
            name = different[0]
            values = f"{ours.get(name)} in {first.record.name}, {theirs.get(name)} in {run.record.name}"
            raise SettingError(f"runs joined by + must differ in their seed only, but got {name}={values}")
        if run.seed == first.seed:
            raise SettingError(f"runs joined by + must differ in their seed, but got seed={run.seed} twice")


def _text(value: Any) -> str:
    return as_text(tuple(value) if isinstance(value, list) else value)
