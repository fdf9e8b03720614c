"""Progress of a command: plain lines, and a bar where the output is a terminal."""

from __future__ import annotations

import errno
import os
import sys
import time
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm

from retinaflow.addresses import without_secrets

SECONDS_PER_LINE = 60.0
"""Seconds between lines of progress where there is no terminal for a bar."""


def report(text: str) -> None:
    """Print a line at once, even when the output goes to a file; without secrets."""
    print_to(sys.stdout, text)


def print_to(stream: TextIO, text: str) -> None:
    """Print a line on a stream at once, without secrets.

    When nobody reads the stream any more (a closed terminal, ``| tee`` that Ctrl-C has ended too), the work continues,
    as it may be about to store its results, and later lines are dropped.
    """
    text = without_secrets(text)
    # The encoding of a log may lack letters of a name: they become escapes.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds as ``45 s``, ``12 min`` or ``3.5 h``."""
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class ImageProgress:
    """Images done out of ``total``: a bar on a terminal, a line a minute elsewhere; nothing when ``quiet``.

    ``done``: images of an earlier process, which do not count for the speed.
    """

    def __init__(self, total: int, *, what: str, done: int = 0, quiet: bool = False) -> None:
        self.count = done
        self._total, self._before, self._what, self._quiet = total, done, what, quiet
        self._start = self._last_line = time.monotonic()
        self._stack = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> ImageProgress:
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total,
                initial=self._before,
                unit="image",
                desc=self._what,
                disable=True if self._quiet else None,
                leave=False,
            )
        )
        self._start = self._last_line = time.monotonic()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    @property
    def images_per_second(self) -> float:
        """Of this process since the start; 0 when it has done nothing."""
        return (self.count - self._before) / max(time.monotonic() - self._start, 1e-9)

    def add(self, images: int, detail: str = "") -> None:
        """Count images that are done. ``detail``: more to show, such as losses."""
        self.count += images
        self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(images)
        now = time.monotonic()
        if self._quiet or not self._bar.disable or now - self._last_line < SECONDS_PER_LINE:
            return
        self._last_line = now
        speed = self.images_per_second
        left = duration((self._total - self.count) / speed) if speed > 0 else "?"
        more = f"  {detail}" if detail else ""
        report(f"{self.count:,} of {self._total:,} images{more}  {speed:.1f} images/s  {left} left")

    def line(self, text: str) -> None:
        """Print a line above the bar; nothing when ``quiet``."""
        if not self._quiet:
            tqdm.write(text) if not self._bar.disable else report(text)
