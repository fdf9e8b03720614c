"""The file of matches: exact where it must be, small, and honest about what a run was evaluated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scoring_scenes import Label, Scene, Truth
from simulated_runs import run, world

from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.images_of_run import images_of_run
from retinaflow.comparison.stored_matches import load_matches, read_matches, save_matches, store_matches
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.training_data import load_training_data
from retinaflow.detections import Detections
from retinaflow.errors import DataError
from retinaflow.metric.challenge import average_precision
from retinaflow.metric.matches import Kind
from retinaflow.metric.result import score_detections
from retinaflow.runs.run import FolderRun
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.resolve import resolve, with_absolute_paths

BOX, FAR = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)


def test_what_is_read_back_scores_exactly_as_what_was_written(tmp_path: Path) -> None:
    kept = run(world(12, 60), 0.5, seed=3, settings={"lr": 0.001})
    save_matches(kept, tmp_path / "matches.npz")
    again = load_matches(tmp_path / "matches.npz")
    np.testing.assert_array_equal(average_precision(again.matches), average_precision(kept.matches))
    weights = np.random.default_rng(0).integers(0, 3, size=(4, 60))
    np.testing.assert_array_equal(
        average_precision(again.matches, image_weights=weights), average_precision(kept.matches, image_weights=weights)
    )
    for name in ("class_ids", "class_names", "ground_truth", "settings", "evaluated_from"):
        assert getattr(again, name) == getattr(kept, name), name
    assert again.matches.dropped == kept.matches.dropped
    np.testing.assert_allclose(again.boxes, kept.boxes, atol=1 / 65_535)
    np.testing.assert_array_equal(again.training.images, kept.training.images)


def test_group_of_entries_keep_their_weight(tmp_path: Path) -> None:
    kept = run(world(3, 20), 0.5, seed=0)
    kind = kept.matches.kind.copy()
    kind[0] = Kind.GROUP_OF
    weight = np.where(kind == Kind.GROUP_OF, 0.5, 1.0)
    kept = replace(kept, matches=replace(kept.matches, kind=kind, weight=weight, group_of_weight=0.5))
    save_matches(kept, tmp_path / "matches.npz")
    np.testing.assert_array_equal(load_matches(tmp_path / "matches.npz").matches.weight, weight)


def test_an_entry_takes_about_a_dozen_bytes(tmp_path: Path) -> None:
    kept = run(world(50, 2000), 0.5, seed=0)
    save_matches(kept, tmp_path / "matches.npz")
    assert (tmp_path / "matches.npz").stat().st_size < 16 * len(kept.matches.score)


@pytest.mark.parametrize("damage", ["cut short", "no archive", "another format"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "matches.npz"
    save_matches(run(world(3, 20), 0.5, seed=0), path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "no archive":
        path.write_text("ap,class")
    else:
        np.savez(path, header=np.frombuffer(b'{"format": 99}', dtype=np.uint8))
    with pytest.raises(ValueError, match=r"matches\.npz: .*evaluate (the run|it) again"):
        load_matches(path)


def test_no_flipped_bit_is_taken_as_a_result(tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    save_matches(run(world(3, 8), 0.5, seed=0), path)
    whole, expected = path.read_bytes(), load_matches(path)
    read = 0
    for offset in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(bytes(damaged))
        try:
            found = load_matches(path)
        except DataError:
            continue
        # A byte that nobody reads, such as the time of an entry.
        read += 1
        assert found.ground_truth == expected.ground_truth
        for name in ("score", "kind", "image_index", "gt_count", "image_ids"):
            np.testing.assert_array_equal(getattr(found.matches, name), getattr(expected.matches, name))
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert read < len(whole) / 5 / 2


def _columns_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


OTHERS = {"missing": None, "empty": np.zeros(0), "a number": np.array(7), "out of range": np.full((2, 4), 1 << 30)}


@pytest.mark.parametrize("other", OTHERS)
def test_a_column_of_another_kind_is_an_error_that_names_the_file(tmp_path: Path, other: str) -> None:
    path = tmp_path / "matches.npz"
    save_matches(run(world(3, 20), 0.5, seed=0), path)
    columns = _columns_of(path)
    for name in columns:
        changed = {key: value for key, value in columns.items() if key != name}
        if OTHERS[other] is not None:
            changed[name] = OTHERS[other]
        np.savez(path, **changed)
        with pytest.raises(DataError, match=r"matches\.npz: .*evaluate (the run|it) again"):
            load_matches(path)


def test_a_header_of_another_structure_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    save_matches(run(world(3, 20), 0.5, seed=0), path)
    columns = _columns_of(path)
    header = json.loads(columns["header"].tobytes())
    for name in header:
        for value in ("missing", None, [], 3, "x"):
            changed = {**header, name: value} if value != "missing" else {k: v for k, v in header.items() if k != name}
            text = json.dumps(changed).encode()
            np.savez(path, **{**columns, "header": np.frombuffer(text, dtype=np.uint8)})
            try:
                found = load_matches(path)
            except DataError:
                continue
            assert average_precision(found.matches).shape == (3,), (name, value)


def _scene(**changes: object) -> Scene:
    ground_truths = (Truth("a", 0, BOX), Truth("a", 0, FAR), Truth("b", 1, BOX))
    return replace(Scene(3, ground_truths, labels=(Label("b", 0, False),)), **changes)  # type: ignore[arg-type]


def test_the_digest_does_not_depend_on_the_order_of_an_image_s_boxes() -> None:
    turned = _scene(ground_truths=(Truth("a", 0, FAR), Truth("a", 0, BOX), Truth("b", 1, BOX)))
    assert ground_truth_digest(turned.annotations()) == ground_truth_digest(_scene().annotations())


CHANGES = {
    "a box moved": (
        {"ground_truths": (Truth("a", 0, BOX), Truth("a", 0, (0.6, 0.6, 0.9, 0.8)), Truth("b", 1, BOX))},
        {0},
    ),
    "a box more": ({"ground_truths": (*_scene().ground_truths, Truth("b", 2, FAR))}, {2}),
    "a group-of flag": ({"ground_truths": (*_scene().ground_truths[:2], Truth("b", 1, BOX, group_of=True))}, {1}),
    "a class that is not exhaustive": (
        {"ground_truths": (*_scene().ground_truths[:2], Truth("b", 1, BOX, not_exhaustive=True))},
        {1},
    ),
    "a verified class": ({"labels": (Label("b", 0, False), Label("b", 2, False))}, {2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_in_the_digest_of_its_class_alone(change: str) -> None:
    given, classes = CHANGES[change]
    before, after = ground_truth_digest(_scene().annotations()), ground_truth_digest(_scene(**given).annotations())
    assert before.images == after.images
    assert {k for k in range(3) if before.classes[k] != after.classes[k]} == classes
    assert before.of_all != after.of_all


def test_a_box_of_a_child_shows_in_its_parent_too() -> None:
    one, other = _scene(links=((2, 0),)), _scene(ground_truths=_scene().ground_truths[1:], links=((2, 0),))
    before, after = ground_truth_digest(one.annotations()), ground_truth_digest(other.annotations())
    assert before.classes[2] != after.classes[2]
    assert before.classes[1] == after.classes[1]


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig])
def test_what_was_evaluated_is_found_from_another_folder_and_has_the_settings_of_the_checkpoint(
    kind: type[TrainConfig] | type[EvaluateConfig],
    tiny_dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_dataset().parent)
    trained = resolve(TrainConfig, {"data": "tiny"})
    config = trained if kind is TrainConfig else resolve(EvaluateConfig, {"data": "tiny"})
    index, nothing = load_training_data(trained).evaluated, Detections.empty()
    bins = ClassBins.unknown(index.num_classes)
    evaluation = score_detections(nothing, index, bins, group_of_weight=1.0)
    # A checkpoint holds them so.
    stored = with_absolute_paths(trained)
    store_matches([FolderRun(tmp_path / "out")], evaluation, nothing, index, bins, config, trained=stored)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kept = read_matches(str(tmp_path / "out"))
    assert kept.settings == stored
    np.testing.assert_array_equal(images_of_run(kept).image_ids, index.image_ids)
