"""``explore``: the page, its pictures and tables, in a store and in a folder; and what it does without image files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.commands import explore
from retinaflow.settings.commands import ExploreConfig
from retinaflow.settings.resolve import resolve

PICTURES = {
    "class_frequency.png", "tail.png", "boxes_per_image.png", "box_sizes.png", "shapes.png",
    "cooccurrence_frequent.png", "label_coverage.png", "group_of.png", "rarest_classes.png",
    "pasted_crops.png",
}  # fmt: skip


class Links(HTMLParser):
    """Every address that a page refers to, and every tag left open."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    assert links.open == []
    return links


@pytest.mark.slow
def test_explore_logs_one_page_that_needs_nothing_else_and_its_pictures(workshop: Any) -> None:
    config = resolve(ExploreConfig, {"data": str(workshop.data), "num_bins": 2, "output": workshop.folder / "explored"})
    path = explore.run(config)
    links = parsed(path)
    assert len([target for target in links.targets if target.startswith("data:image/")]) == len(PICTURES)
    assert not [target for target in links.targets if not re.match(r"data:image/(png|jpeg);base64,|#s\d+$", target)]
    assert path.stat().st_size < 2_000_000
    run = mlflow.search_runs(
        filter_string="tags.`retinaflow.command` = 'explore'", experiment_names=["retinaflow"], output_format="list"
    )[0]
    logged = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert logged >= PICTURES | {"explore.html", "class_statistics.csv"}
    assert run.data.metrics["explore/images"] == 12
    table = pd.read_csv(path.with_name("class_statistics.csv")).set_index("class")
    assert table.loc["Bus", "images"] == 2
    assert table.loc["Vehicle", "tree_images"] > table.loc["Vehicle", "images"] == 1


def test_explore_finds_what_is_wrong_and_lists_it(workshop: Any, tiny_dataset: Any) -> None:
    folder = tiny_dataset("wrong")
    boxes, labels = folder / "train-annotations-bbox.csv", folder / "train-annotations-human-imagelabels.csv"
    with boxes.open("a", encoding="utf-8") as file:
        file.write("train001,x,/m/0plant,1,0,1,0,1,0,0,0,0,0\ntrain000,x,/m/0tree,1,0.5,0.51,0.5,0.9,0,0,0,0,0\n")
    with labels.open("a", encoding="utf-8") as file:
        file.write("train001,v,/m/0plant,0\n")
    path = explore.run(
        resolve(ExploreConfig, {"data": str(folder), "track": False, "output": workshop.folder / "wrong_explored"})
    )
    found = pd.read_csv(path.with_name("suspicious.csv"))
    assert {("whole image", "train001"), ("class verified absent", "train001"), ("tiny box", "train000")} <= set(
        zip(found["rule"], found["image"], strict=True)
    )
    assert "whole image" in path.read_text(encoding="utf-8")


def test_without_samples_no_image_file_is_needed(workshop: Any, tiny_dataset: Any) -> None:
    folder = tiny_dataset("bare")
    for image in (folder / "images").iterdir():
        image.unlink()
    (folder / "images").rmdir()
    settings = {"data": str(folder), "track": False, "samples": 0, "output": workshop.folder / "bare_explored"}
    path = explore.run(resolve(ExploreConfig, settings))
    names = {file.name for file in path.parent.iterdir()}
    from_images = {"shapes.png", "rarest_classes.png", "pasted_crops.png"}
    assert names >= PICTURES - from_images
    assert not names & from_images
    assert "image sizes are not known" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["Car", "Car,Bus"])
def test_a_few_classes_can_be_explored(group: str, workshop: Any) -> None:
    settings = {"data": str(workshop.data), "class_group": group, "track": False, "output": workshop.folder / "few"}
    parsed(explore.run(resolve(ExploreConfig, settings)))


def test_an_exhaustive_set_is_told_apart_from_a_labelled_one_and_names_are_no_formulas(
    workshop: Any, tiny_dataset: Any
) -> None:
    data = tiny_dataset("dollars")
    classes = data / "class-descriptions.csv"
    classes.write_text(classes.read_text().replace(",Car", r",US$ \q CA$"))
    settings = {"data": str(data), "track": False, "exhaustive": True, "output": workshop.folder / "dollars"}
    path = explore.run(resolve(ExploreConfig, settings))
    text = path.read_text(encoding="utf-8")
    assert "that is not boxed on an image is absent there" in text
    assert "image-level labels<" not in text
    table = pd.read_csv(workshop.folder / "dollars" / "class_statistics.csv")
    assert table["known"].eq(1).all()
    # Those of the file, not one for every class on every image.
    labels = pd.read_csv(data / "train-annotations-human-imagelabels.csv")
    assert table[["verified_present", "verified_absent"]].to_numpy().sum() == len(labels)
