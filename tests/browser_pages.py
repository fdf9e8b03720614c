"""Pages in Chromium for tests: fixtures to import, and the marks of tests that need it.

Screenshots go to the folder RETINAFLOW_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000
"""Milliseconds for a page to show something; a busy machine takes long to start a browser."""
NEEDS_BROWSER = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
]
ASSISTANT = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"
"""Key by which ``mlflow ui`` remembers that it has opened its assistant, which covers a third of the page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, which asks nothing of a network by itself."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=PATIENCE)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty page of 1400 x 900 pixels."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.set_default_timeout(PATIENCE)
    opened.add_init_script(f"try {{ localStorage.setItem('{ASSISTANT}', 'true') }} catch {{ }}")
    yield opened
    opened.close()


def screenshot(page: Any, name: str) -> None:
    """Keep what the page shows, where a folder is set for it."""
    folder = os.environ.get("RETINAFLOW_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", timeout=PATIENCE)


def open_alone(page: Any, path: Path) -> list[str]:
    """Open a file; the list fills with errors of its script and with whatever it asks of a network."""
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else trouble.append(asked.url))
    page.goto(path.as_uri())
    return trouble
