"""What one sees of a long way through images: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from retinaflow.progress import report
from retinaflow.training.progress import SECONDS_PER_LINE, duration


class ImageProgress:
    """Counts images; ``done``: those of an earlier run, which say nothing of the speed."""

    def __init__(self, total: int, *, what: str, done: int = 0) -> None:
        self._total, self._before, self._what = total, done, what
        self._start = self._last_line = time.monotonic()
        self._stack = ExitStack()
        self._bar: Any = None
        self.count = done

    def __enter__(self) -> ImageProgress:
        bar = tqdm(total=self._total, initial=self._before, unit="image", desc=self._what, disable=None, leave=False)
        self._bar = self._stack.enter_context(bar)
        self._start = self._last_line = time.monotonic()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    @property
    def images_per_second(self) -> float:
        """Since the start, in this process; 0 when nothing was done."""
        return (self.count - self._before) / max(time.monotonic() - self._start, 1e-9)

    def add(self, images: int) -> None:
        """So many more are done."""
        self.count += images
        self._bar.update(images)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_PER_LINE:
            self._last_line = now
            speed = self.images_per_second
            left = duration((self._total - self.count) / speed) if speed > 0 else "?"
            report(f"{self.count:,} of {self._total:,} images  {speed:.1f} images/s  {left} left")
