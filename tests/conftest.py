"""Fixtures of all tests: a cache folder of their own, a tiny data set in the published form, and shared trainings."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

# Before torch is imported: several test processes must not each take every core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_CLASSES = (
    ("/m/0car", "Car"),
    ("/m/0vehicle", "Vehicle"),
    ("/m/0tree", "Tree"),
    ("/m/0plant", "Plant"),
    ("/m/0bus", "Bus"),
)
"""Two levels: Vehicle > Car, Bus and Plant > Tree. Boxes are given for Car, Tree and Bus, once for Vehicle."""

TINY_SHAPES = ((64, 96), (96, 64), (80, 80), (48, 128))
"""(height, width) of the images, in turn."""

_COLOURS = {
    "/m/0car": (40, 40, 220),
    "/m/0tree": (40, 180, 40),
    "/m/0bus": (220, 160, 30),
    "/m/0vehicle": (200, 40, 200),
}
_BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
_KEEP_OUT = 2
_LONG = ("slow", "browser", "postgres")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--precision``: the precision that precision=auto takes in the tests, so that they do not depend on the CPU."""
    parser.addoption("--precision", choices=("float32", "bfloat16"), default="float32")


def pytest_configure(config: pytest.Config) -> None:
    """For this process and those that tests start. bfloat16 is emulated where the processor lacks it."""
    os.environ["RETINAFLOW_AUTO_PRECISION"] = config.getoption("precision")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first: the processes take files in this order, and a long one at the end would run alone."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in _LONG)}
    items.sort(key=lambda item: (item.path not in long, item.path.parent.name != "commands"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETINAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_dataset(name, train=12, validation=6, seed=0)`` writes a data set and returns its folder in ``tmp_path``.

    Real JPEGs of about 96 x 64 pixels in four shapes, every box a filled rectangle in its class's colour. Car and Tree
    are on about half of the images, Bus on every sixth (the rare one). The first image of a split has a group-of box of
    cars; the last but one of six has no boxes, only labels. Image-level labels: the boxed classes present, Plant absent
    where there is no tree.
    """

    def write(name: str = "tiny", *, train: int = 12, validation: int = 6, seed: int = 0) -> Path:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        with (folder / "class-descriptions.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(TINY_CLASSES)
        links = {"/m/0vehicle": ("/m/0car", "/m/0bus"), "/m/0plant": ("/m/0tree",)}
        nodes = [
            {"LabelName": parent, "Subcategory": [{"LabelName": child} for child in children]}
            for parent, children in links.items()
        ]
        tree = {"LabelName": "/m/0entity", "Subcategory": nodes}
        (folder / "bbox_labels_hierarchy.json").write_text(json.dumps(tree), encoding="utf-8")
        for number, (split, count) in enumerate((("train", train), ("validation", validation))):
            _write_split(folder, split, count, np.random.default_rng([seed, number]))
        return folder

    return write


def _write_split(folder: Path, split: str, count: int, rng: np.random.Generator) -> None:
    boxes: list[list[object]] = []
    labels: list[list[object]] = []
    for number in range(count):
        image_id = f"{split}{number:03d}"
        found = _classes_of(number, with_parent=split == "train")
        shape = TINY_SHAPES[number % len(TINY_SHAPES)]
        pixels = np.full((*shape, 3), 128, dtype=np.uint8)
        for place, mid in enumerate(found):
            x1, x2, y1, y2 = _box_in_column(place, len(found), shape, rng)
            pixels[y1:y2, x1:x2] = _COLOURS[mid]
            sides = [f"{side:.6f}" for side in (x1 / shape[1], x2 / shape[1], y1 / shape[0], y2 / shape[0])]
            group_of = int(number == 0 and place == 0)
            boxes.append([image_id, "xclick", mid, 1, *sides, 0, 0, group_of, 0, 0])
        labels += [[image_id, "verification", mid, 1] for mid in dict.fromkeys(found)]
        if "/m/0tree" not in found:
            labels.append([image_id, "verification", "/m/0plant", 0])
        assert cv2.imwrite(str(folder / "images" / f"{image_id}.jpg"), pixels)
    for kind, header, rows in (
        ("bbox", _BOX_COLUMNS, boxes),
        ("human-imagelabels", ("ImageID", "Source", "LabelName", "Confidence"), labels),
    ):
        with (folder / f"{split}-annotations-{kind}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])


def _classes_of(number: int, *, with_parent: bool) -> list[str]:
    if number % 6 == 4:
        return []
    found = ["/m/0car"] if number % 3 != 2 else []
    found += ["/m/0tree"] if number % 2 else []
    found += ["/m/0bus"] if number % 6 == 5 else []
    found += ["/m/0vehicle"] if with_parent and number == 2 else []
    return found or ["/m/0tree"]


def _box_in_column(
    place: int, columns: int, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Pixels x1, x2, y1, y2 in the ``place``-th of some columns of the image, so that boxes do not overlap."""
    height, width = shape
    left, right = place * width // columns + _KEEP_OUT, (place + 1) * width // columns - _KEEP_OUT
    x1, y1 = int(rng.integers(left, (left + right) // 2)), int(rng.integers(0, height // 3))
    x2, y2 = int(rng.integers(x1 + 10, right + 1)), int(rng.integers(y1 + 16, height + 1))
    return x1, x2, y1, y2


# A real MLflow store and trainings that several tests use. Heavy packages are imported where they are used, so that
# tests of a single room load no more than they need.


@pytest.fixture(scope="session")
def _workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from workshop import Workshop, make_store

    workshop = Workshop(tmp_path_factory.mktemp("commands"))
    make_store(workshop.folder)
    yield workshop
    # Checkpoints of 45 MB and more must not outlive the tests.
    shutil.rmtree(workshop.folder, ignore_errors=True)


@pytest.fixture
def workshop(_workshop: Any, tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The workshop as current folder, its store as MLflow's."""
    import mlflow

    if not _workshop.data.exists():
        shutil.move(tiny_dataset(), _workshop.data)
    monkeypatch.chdir(_workshop.folder)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_workshop.uri)
    yield _workshop
    # Choosing an experiment is remembered in the environment.
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def trained(workshop: Any) -> Any:
    """A tracked training of two epochs, registered as tiny-detector."""
    from retinaflow.commands import train

    return workshop.once("trained", lambda: train.run(workshop.settings(register_as="tiny-detector")))


@pytest.fixture
def evaluated(trained: Any, workshop: Any) -> Path:
    """The output folder of ``evaluate`` of the training."""
    from retinaflow.commands import evaluate
    from retinaflow.settings.commands import EvaluateConfig
    from retinaflow.settings.resolve import resolve

    def make() -> Path:
        output = workshop.folder / "evaluated"
        evaluate.run(resolve(EvaluateConfig, {"from_run": trained.run_id, "output": str(output), "bootstrap": 0}))
        return output

    result: Path = workshop.once("evaluated", make)
    return result


@pytest.fixture
def lab(tiny_dataset: Callable[..., Path]) -> Any:
    """A small detector and the tiny data set, ready to train."""
    from lab import Lab

    return Lab.on(tiny_dataset())
