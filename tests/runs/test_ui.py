"""Comparing runs as a person does: ``mlflow server``, clicked through in Chromium.

Runs and tables are logged through the project's own code into a real store; nothing outside this machine is asked.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from browser_pages import NEEDS_BROWSER, PATIENCE, browser, page, screenshot
from mlflow.entities import LoggedModelOutput
from numpy.typing import NDArray
from simulated_runs import run, table_of, world

from retinaflow.metric.challenge import Scores, average_precision
from retinaflow.metric.per_class import summary
from retinaflow.metric.result import EvaluationResult
from retinaflow.reports.class_figures import ap_vs_frequency, class_frequency
from retinaflow.reports.evaluation_artifacts import log_tables
from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.logged_model import link_metrics
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.resolve import resolve

__all__ = ["browser", "page"]
pytestmark = NEEDS_BROWSER
MADE = world(20, 150)
TRAIN, VALIDATION = (
    DatasetInput(f"birds/{name}", digest * 16, "/data/birds", {"images": images, "boxes": 3 * images}, context)
    for name, digest, images, context in (("train", "a", 900, "training"), ("validation", "b", 150, "validation"))
)
RUNS = ((0, "uniform"), (1, "binned"), (2, "class-aware"))
SKILLS = {"uniform": 0.3, "binned": np.linspace(0, 1, 20), "class-aware": np.linspace(-0.5, 1, 20)}


def _pixels(name: str, step: int) -> NDArray[np.uint8]:
    """An image that differs by run and step."""
    pixels = np.full((120, 200, 3), 60, dtype=np.uint8)
    pixels[20:100, 20 : 40 + 50 * step] = [(86, 180, 233), (230, 159, 0), (0, 158, 115)][len(name) % 3]
    return pixels


def _log(name: str, skill: Any, seed: int) -> None:
    config = resolve(TrainConfig, {"sampling": name, "rare_augment": 0.5 if name == "uniform" else 0.8})
    kept = run(MADE, skill, seed=seed)
    table = table_of(kept, MADE)
    scores = Scores(average_precision(kept.matches), kept.matches.num_truths, kept.matches)
    counts = kept.training
    with start_run("train", TrackingSettings(experiment="retinaflow", output=Path("out")), name=name) as logged:
        logged.log_params(config.model_dump())
        logged.log_datasets([TRAIN, VALIDATION])
        for step in range(4):
            logged.log_image(_pixels(name, step), key="validation/1 Torch", step=step)
        for step in (1, 2, 3):
            logged.log_metrics({name: value * step / 3 for name, value in summary(table).items()}, step=step)
        log_tables(logged, EvaluationResult(scores, table, summary(table)), {"mAP": scores.mean_ap})
        logged.log_figure(ap_vs_frequency(table), "ap_vs_frequency.png")
        frequencies = class_frequency(
            counts.images, edges=np.array([1.0, 100.0, 1e4]), bin_of_class=counts.bin_of_class, names=kept.class_names
        )
        logged.log_figure(frequencies, "class_frequency.png")
    _give_model(logged.run_id)


def _give_model(run_id: str) -> None:
    """A logged model with the metrics of the run, without files, which no page opens."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment, name="model", source_run_id=run_id)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 3)])
    link_metrics(client, run_id, model.model_id, step=3, dataset=(VALIDATION.name, VALIDATION.digest))
    client.finalize_logged_model(model.model_id, "READY")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server whose store holds ``main`` with two children, and a run of its own."""
    folder = tmp_path_factory.mktemp("ui")
    uri, before, where = f"sqlite:///{folder}/mlflow.db", mlflow.get_tracking_uri(), Path.cwd()
    os.chdir(folder)
    try:
        with _warnings_off():
            mlflow.set_tracking_uri(uri)
            mlflow.search_experiments()
        with start_run("main", TrackingSettings(experiment="retinaflow", output=Path("out")), name="main"):
            for seed, name in enumerate(("uniform", "binned")):
                _log(name, SKILLS[name], seed)
        _log("class-aware", SKILLS["class-aware"], 2)
    finally:
        os.chdir(where)
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        mlflow.set_tracking_uri(before)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    started = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"],
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/health", started)
        yield address
    finally:
        # The server's workers are in its process group, and are ended with it.
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def _wait_for(address: str, started: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 5 * PATIENCE / 1000
    while time.monotonic() < deadline:
        assert started.poll() is None, "mlflow server ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


def _warnings_off() -> Any:
    import warnings

    # MLflow's tables are not yet made for SQLAlchemy 2.1, and say so once, when a store is first opened.
    return warnings.catch_warnings(action="ignore")


def _open_runs(page: Any, server: str, *, view: str = "LIST") -> None:
    """The runs of the experiment."""
    page.goto(f"{server}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode={view}")
    page.get_by_role("link", name="class-aware").first.wait_for()


def _text(page: Any) -> str:
    """What a person reads, line ends made spaces."""
    return " ".join(page.locator("body").inner_text().split())


def _until(page: Any, pattern: str) -> None:
    """Wait until the page's text holds the pattern."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not re.search(pattern, text := _text(page)):
        assert time.monotonic() < deadline, f"the page shows no {pattern}, but {text}"
        page.wait_for_timeout(200)


def _row(page: Any, name: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True)).first


def test_a_parent_and_its_children_are_read_as_a_tree(page: Any, server: str) -> None:
    _open_runs(page, server)
    assert page.get_by_role("link", name="main", exact=True).count() == 1
    child = page.get_by_role("link", name="uniform", exact=True)
    if not child.count():
        _row(page, "main").get_by_role("button").first.click()
    child.wait_for()
    assert page.get_by_role("link", name="binned", exact=True).count() == 1


def test_two_runs_are_selected_and_compared(page: Any, server: str) -> None:
    _open_runs(page, server)
    if not page.get_by_role("link", name="uniform", exact=True).count():
        _row(page, "main").get_by_role("button").first.click()
    for name in ("uniform", "binned"):
        _row(page, name).get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("Artifacts", exact=True).wait_for()

    # Parameters: those that differ and nothing else.
    assert "anchor_scale" in _text(page)
    page.get_by_role("switch").first.click()
    page.get_by_text("anchor_scale", exact=True).wait_for(state="detached")
    shown = _text(page)
    start = shown.index("Show diff only")
    parameters = shown[start : shown.index("Metrics", start)]
    assert "sampling" in parameters
    assert "rare_augment" in parameters
    assert "backbone" not in parameters
    for number in range(1, 5):
        assert f"val/mAP_bin_{number}" in shown
    screenshot(page, "compare_top")

    # Files at the root of the runs: both tables, then both pictures.
    _choose(page, "per_class_ap.csv")
    page.get_by_text("Previewing the first").nth(1).wait_for()
    rarest = table_of(run(MADE, 0.0, seed=0), MADE)["class"][0]
    assert page.get_by_text(rarest, exact=True).count() == 2
    screenshot(page, "compare_tables")
    for name in ("ap_vs_frequency.png", "class_frequency.png"):
        _choose(page, name)
        pictures = page.get_by_role("img", name=name)
        pictures.nth(1).wait_for()
        boxes = [pictures.nth(number).bounding_box() for number in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1
        screenshot(page, f"compare_{name.removesuffix('.png')}")


def _choose(page: Any, name: str) -> None:
    file = page.get_by_text(name, exact=True).first
    # The list scrolls by itself inside of a page that scrolls: a click by coordinates would miss it.
    file.evaluate("element => element.scrollIntoView({block: 'center'})")
    file.dispatch_event("click")


def test_the_column_dataset_names_the_images_of_a_run(page: Any, server: str) -> None:
    _open_runs(page, server, view="TABLE")
    _until(page, r"class-aware .*birds/train \(aaaa")
    screenshot(page, "runs_list")


def test_the_models_tab_shows_the_metrics_of_each_model_and_on_what_they_were_measured(page: Any, server: str) -> None:
    # The open-source page offers no order by a metric; the store does (test_logged_model.py).
    page.set_viewport_size({"width": 2600, "height": 900})
    page.goto(f"{server}/#/experiments/1/models?workflowType=machine_learning")
    _until(page, r"Dataset: ?birds/validation")
    screenshot(page, "models")
    shown = _text(page)
    assert "val/mAP_rare" in shown
    for seed, name in RUNS:
        value = summary(table_of(run(MADE, SKILLS[name], seed=seed), MADE))["val/mAP_rare"]
        assert f"{value:.6f}"[:6] in shown


def test_the_image_grid_shows_two_runs_at_two_steps(page: Any, server: str) -> None:
    _open_runs(page, server, view="CHART")
    if not page.get_by_role("link", name="uniform", exact=True).count():
        _row(page, "main").get_by_role("button").first.click()
    for title in ("validation", "validation/1 Torch"):  # A card is made when its section comes into view.
        heading = page.get_by_text(title, exact=True).first
        heading.evaluate("element => element.scrollIntoView({block: 'center'})")
    images = page.locator("img[src*='get-artifact']")
    slider = page.get_by_role("slider").first
    seen = []
    for step in (0, 1):
        if step:
            slider.press("ArrowRight")
        shown = page.locator(f"img[src*='%2Bstep%2B{step}%2B']")
        shown.nth(1).wait_for()
        sources = [source.split("run_uuid=")[1] for source in images.evaluate_all("all => all.map(one => one.src)")]
        assert len(sources) == len(set(sources)) == shown.count() >= 2
        assert all(shown.evaluate_all("all => all.map(one => one.complete && one.naturalWidth > 100)"))
        seen.append(set(sources))
        screenshot(page, f"image_grid_{step}")
    assert seen[0] == seen[1]


def test_ap_of_every_bin_is_a_chart(page: Any, server: str) -> None:
    _open_runs(page, server, view="CHART")
    page.get_by_text("val/mAP_bin_1", exact=False).first.wait_for()
    _until(page, r"val ?\(\d+\)")
    names = {f"val/mAP_bin_{number}" for number in range(1, 5)}
    titles = page.get_by_text(re.compile(r"^val/mAP_bin_\d$"))
    assert names <= set(titles.all_inner_texts())
    screenshot(page, "charts")


def test_the_table_view_opens_as_class_by_run_on_ap(page: Any, server: str) -> None:
    _open_runs(page, server, view="ARTIFACT")
    page.get_by_text("per_class_ap.json").first.wait_for()
    _until(page, r"Group by: ?class Compare: ?ap")
    expected = table_of(run(MADE, SKILLS["class-aware"], seed=2), MADE)
    page.get_by_text(str(expected["class"][0]), exact=True).first.wait_for()
    page.get_by_text(f"{expected['ap'][0]:.4f}".rstrip("0"), exact=True).first.wait_for()
    screenshot(page, "table_view")
