"""Merged models: what is read is what was written, what decides detections is in the digest, another structure is
refused, and members detect and are joined as a merge joins them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.images import BadImage
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.weights import load_weights
from retinaflow.errors import DataError, SettingError
from retinaflow.inference import checkpoint as checkpoint_module
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinaflow.inference.detector import Detector, MergedDetector
from retinaflow.inference.merged_checkpoint import (
    MergedCheckpoint,
    MergedMember,
    load_model,
    merged_of,
    save_merged,
)
from retinaflow.inference.merged_detections import merge_detections
from retinaflow.settings.model_settings import DetectorSettings, JoinSettings
from retinaflow.statistics.calibration import Calibrator, apply_calibrators

PLATT = Calibrator("platt", (0.5, 1.0))
AS_TRAINED = {"score_threshold": 0.001, "nms_iou": 0.5, "max_detections": 40, "precision": "float32"}


def _member(lab: Any, classes: list[int], seed: int) -> MergedMember:
    """An untrained network of some classes; the first class is calibrated."""
    checkpoint = Checkpoint(
        network=lab.network,
        state=RetinaNet(lab.network, len(classes), seed=seed).state_dict(),
        taxonomy=lab.index.taxonomy.subset(classes),
        bins=ClassBins.unknown(len(classes)),
        buckets=lab.buckets,
        parents="learn",
        settings=AS_TRAINED,
        data_digest="abc",
        epoch=4,
    )
    return MergedMember(checkpoint, (PLATT, *[Calibrator()] * (len(classes) - 1)), f"run{seed}")


@pytest.fixture
def merged(lab: Any) -> MergedCheckpoint:
    """Two members that share the class 2."""
    return MergedCheckpoint(
        members=(_member(lab, [0, 1, 2], 1), _member(lab, [2, 3, 4], 2)),
        join=JoinSettings(max_detections=30),
        taxonomy=lab.index.taxonomy,
        bins=lab.bins,
        settings={**AS_TRAINED, "score_threshold": 0.0, "max_detections": 30},
        data_digest="abc",
    )


def test_what_is_read_is_what_was_written(merged: MergedCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "best.pt"
    save_merged(merged, path)
    read = load_model(path)
    assert isinstance(read, MergedCheckpoint)
    assert read.digest == merged.digest
    for name in ("taxonomy", "join", "settings", "data_digest"):
        assert getattr(read, name) == getattr(merged, name), name
    for ours, theirs in zip(read.members, merged.members, strict=True):
        assert (ours.run, ours.calibrators) == (theirs.run, theirs.calibrators)
        assert ours.checkpoint.digest == theirs.checkpoint.digest
        assert ours.checkpoint.settings == theirs.checkpoint.settings
    assert [list(own) for own in read.classes] == [[0, 1, 2], [2, 3, 4]]


def test_the_values_of_many_classes_can_be_read(
    merged: MergedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a small file may have: AP of each class and epoch in last.pt, calibrators in a merged model."""
    monkeypatch.setattr(checkpoint_module, "_MAX_VALUES", 3000)
    first, second = merged.members
    history = {epoch: [0.5 + epoch] * 100 for epoch in range(100)}
    save_checkpoint(replace(first.checkpoint, progress={"history": history}), tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt").progress == {"history": history}
    rising = tuple(float(n) for n in range(4000))
    many = replace(first, calibrators=(Calibrator("isotonic", rising), *first.calibrators[1:]))
    save_merged(replace(merged, members=(many, second)), tmp_path / "best.pt")
    read = load_model(tmp_path / "best.pt")
    assert isinstance(read, MergedCheckpoint)
    assert read.members[0].calibrators == many.calibrators
    # The same list named many times is still refused.
    save_checkpoint(replace(first.checkpoint, progress={"history": [[0.5] * 100] * 10000}), tmp_path / "last.pt")
    with pytest.raises(DataError, match="it must have at most"):
        load_checkpoint(tmp_path / "last.pt")


def test_all_that_decides_detections_is_in_the_digest_and_nothing_else(merged: MergedCheckpoint) -> None:
    first, second = merged.members
    other_settings = replace(first.checkpoint, settings={**AS_TRAINED, "nms_iou": 0.6})
    others = [
        replace(merged, members=(second, first)),
        replace(merged, members=(replace(first, calibrators=(Calibrator(),) * 3), second)),
        replace(merged, members=(replace(first, checkpoint=other_settings), second)),
        replace(merged, join=JoinSettings(max_detections=31)),
    ]
    assert len({merged.digest, *(other.digest for other in others)}) == 5
    renamed = replace(merged, members=(replace(first, run="elsewhere"), second), settings={}, data_digest="x")
    assert renamed.digest == merged.digest


def _joined(merged: MergedCheckpoint, index: AnnotationIndex, **limits: Any) -> Detections:
    """The members' own detections, joined by hand."""
    parts = [apply_calibrators(Detector.load(one.checkpoint).detect(index), one.calibrators) for one in merged.members]
    return merge_detections(parts, merged.classes, merged.taxonomy, JoinSettings(**{"max_detections": 30, **limits}))


def _assert_equal(one: Detections, two: Detections) -> None:
    assert len(one)
    for column in ("image_index", "class_index", "score", "boxes"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))


def test_members_detect_as_trained_and_are_calibrated_and_joined(merged: MergedCheckpoint, lab: Any) -> None:
    detector = Detector.load(merged)
    assert isinstance(detector, MergedDetector)
    found = detector.detect(lab.index)
    _assert_equal(found, _joined(merged, lab.index))
    assert np.bincount(found.image_index).max() == 30
    # A file alone, in a batch of one.
    data = np.frombuffer((Path(lab.index.images_folder) / str(lab.index.files[3])).read_bytes(), dtype=np.uint8)
    alone = detector.detect_file(data, tuple(lab.index.sizes[3].tolist()))
    _assert_equal(alone, Detector.load(merged, DetectorSettings(batch_size=1)).detect(lab.index.take(np.array([3]))))


def test_limits_and_parents_are_those_of_the_join(merged: MergedCheckpoint, lab: Any) -> None:
    index = lab.index.take(np.arange(4))
    given = DetectorSettings(max_detections=7, max_detections_per_class=2, nms_iou=0.3)
    found = Detector.load(merged, DetectorSettings(max_detections=7, max_detections_per_class=2)).detect(index)
    _assert_equal(found, _joined(merged, index, max_detections=7, max_detections_per_class=2))
    with pytest.raises(SettingError, match=r"nms_iou must not be given, but got nms_iou=0\.3; evaluate each member"):
        Detector.load(merged, given)
    limits = {"max_detections": 7, "max_detections_per_class": 2, "nms_iou": 0.3, "expand_predictions": True}
    with_parents = replace(merged, join=JoinSettings(max_detections=30, expand_predictions=True))
    _assert_equal(Detector.load(with_parents, given).detect(index), _joined(merged, index, **limits))
    asked = Detector.load(merged, DetectorSettings(max_detections=7, max_detections_per_class=2), parents="expand")
    expanded = _joined(merged, index, **(limits | {"nms_iou": 0.5}))
    _assert_equal(asked.detect(index), expanded)
    threshold = float(np.median(found.score))
    high = Detector.load(
        merged, DetectorSettings(max_detections=7, max_detections_per_class=2, score_threshold=threshold)
    )
    _assert_equal(high.detect(index), found.take(found.score >= threshold))


@pytest.mark.parametrize(
    ("given", "name"),
    [({"image_size": 64}, "image_size"), ({"nms": "soft-nms"}, "nms"), ({"candidates_per": "class"}, "candidates_per")],
    ids=str,
)
def test_settings_of_the_members_are_refused(merged: MergedCheckpoint, given: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=f"so {name} must not be given, but got {name}="):
        Detector.load(merged, DetectorSettings(**given))
    # That of all members changes nothing.
    Detector.load(merged, DetectorSettings(nms="nms", candidates_per="level", image_size="trained", nms_iou=0.5))


def test_each_image_counts_once_and_is_bad_once(merged: MergedCheckpoint, lab: Any) -> None:
    (Path(lab.index.images_folder) / str(lab.index.files[2])).write_bytes(b"no image")
    counted: list[int] = []
    bad: list[BadImage] = []
    Detector.load(merged).detect(lab.index, after_batch=counted.append, on_bad_image=bad.append)
    assert [image.image_id for image in bad] == [str(lab.index.image_ids[2])]
    assert sum(counted) == len(lab.index) - 1
    assert len(counted) == 4  # Two shapes for each of two members: a stop is noticed after each batch.
    with pytest.raises(DataError, match=str(lab.index.image_ids[2])):
        Detector.load(merged).detect(lab.index)


# Where one network is needed


def test_a_merged_model_is_no_checkpoint_of_one_network(merged: MergedCheckpoint, lab: Any, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_merged(merged, path)
    with pytest.raises(DataError, match=r"best\.pt: one network is needed, but this is a merged model of several"):
        load_checkpoint(path)
    with pytest.raises(DataError, match=r"best\.pt must hold the weights of one network, but it is a merged model"):
        load_weights(lab.model(seed=1), str(path))


# Files that somebody else has written


def _document(merged: MergedCheckpoint, folder: Path) -> dict[str, Any]:
    """What the file holds, with one tensor alone for each member."""
    members = tuple(
        replace(one, checkpoint=replace(one.checkpoint, state={"head.weight": torch.ones(3)})) for one in merged.members
    )
    small = replace(merged, members=members)
    save_merged(small, folder / "small.pt")
    document: dict[str, Any] = torch.load(folder / "small.pt", weights_only=True)
    assert merged_of(document, folder / "small.pt").digest == small.digest
    return document


_OTHERS = {
    "nothing": None,
    "a list": [1],
    "a text": "x",
    "a number": -1,
    "a mapping": {"x": 1},
    "a tensor": torch.ones(2),
}


def _changed(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each entry, of a member and of the join too, removed or of another kind."""
    paths = [(name,) for name in document] + [("join", name) for name in document["join"]]
    paths += [("members", 1, name) for name in document["members"][1]]
    paths += [("members", 1, "checkpoint", name) for name in document["members"][1]["checkpoint"]]
    paths += [("members", 1, "calibrators", 0, name) for name in ("method", "points")]
    for path in paths:
        for what, value in {"missing": None, **_OTHERS}.items():
            changed = copy.deepcopy(document)
            inside: Any = changed
            for step in path[:-1]:
                inside = inside[step]
            if what == "missing":
                del inside[path[-1]]
            else:
                inside[path[-1]] = value
            yield f"{'.'.join(map(str, path))} {what}", changed


def test_another_structure_is_refused_with_the_name_of_the_file_and_never_a_bug(
    merged: MergedCheckpoint, tmp_path: Path
) -> None:
    path, refused, read = tmp_path / "other.pt", [], []
    for name, document in _changed(_document(merged, tmp_path)):
        try:
            assert len(merged_of(document, path).digest) == 64
            read.append(name)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 120
    assert all("other.pt: " in message and len(message) < 400 for message in refused)
    # What every version may have, or has a default for.
    free = (r"(members\.1\.checkpoint\.)?(settings a mapping|data_digest a text)", r"join\.\w+ missing")
    free += (r"members\.1\.run a text", r"members\.1\.checkpoint\.(parents a text|progress (nothing|missing))")
    free += (r"join\.\w+ a number",)
    assert [name for name in read if not re.fullmatch("|".join(free), name)] == []


def _with_points(document: dict[str, Any], method: str, points: list[Any]) -> None:
    document["members"][0]["calibrators"][0] = {"method": method, "points": points}


def _with_members(document: dict[str, Any], count: int) -> None:
    document["members"] = document["members"][:1] * count


def _as_member(document: dict[str, Any]) -> None:
    document["members"][0]["checkpoint"] = copy.deepcopy(document)


def _with_other_class(document: dict[str, Any]) -> None:
    document["members"][0]["checkpoint"]["taxonomy"]["ids"][0] = "/m/other"


HOSTILE = {
    "a falling calibrator": (lambda d: _with_points(d, "isotonic", [0.1, 0.2, 0.9, 0.3]), "must fit its method, iso"),
    "half a point": (lambda d: _with_points(d, "isotonic", [0.1, 0.2, 0.9]), "must fit its method, isotonic"),
    "a calibrator of nothing": (lambda d: _with_points(d, "platt", [float("nan"), 1.0]), "must fit its method, platt"),
    "no member": (lambda d: _with_members(d, 0), "1 to 100 members are needed"),
    "many members": (lambda d: _with_members(d, 101), "1 to 100 members are needed"),
    "a class without a model": (lambda d: _with_members(d, 1), "each class must be one of a member"),
    "a class of no list": (_with_other_class, "it lacks '/m/other'"),
    "a merge in a merge": (_as_member, "one network is needed, but this is a merged model"),
    "a later format": (lambda d: d.update(format=2), "format 1 is needed, but this one has format 2"),
    "weights": (
        lambda d: d["members"][0]["checkpoint"]["state"].update(a=torch.tensor(float("nan"))),
        "a has values that are not finite",
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_what_is_no_merged_model_is_refused(merged: MergedCheckpoint, tmp_path: Path, fault: str) -> None:
    change, message = HOSTILE[fault]
    document = _document(merged, tmp_path)
    change(document)
    with pytest.raises(DataError, match=rf"a\.pt: .*{message}"):
        merged_of(document, tmp_path / "a.pt")


def test_a_flipped_bit_is_noticed(merged: MergedCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_merged(merged, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"best\.pt: not a readable checkpoint: .* is damaged"):
        load_model(path)
