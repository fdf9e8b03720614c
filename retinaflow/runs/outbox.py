"""Results on their way to a store that may be out of reach: a queue on disk, and a thread that delivers it in order.

``put`` writes an item to ``FOLDER/unsent.jsonl`` (its file beside it) and returns; the thread hands the items to
``deliver`` one after the other. An item that fails is tried again until it arrives. So a store that is out of reach for
a while gets everything in order, and nothing twice if ``deliver`` checks items marked ``again``. An item that the store
refuses is set aside, so that it does not hold up the rest. After ``close`` the folder holds exactly what never arrived,
and is removed when all did. An :class:`Outbox` on a folder that an earlier process left delivers that first.

``put`` costs one line appended to a file, and a copy of a small file or a link to a large one. The journal survives
``kill -9``, though not a loss of power.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retinaflow.errors import first_line
from retinaflow.files import atomic_file

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts; the last one is repeated. They bound how late it is noticed that the store is back."""
ATTEMPTS = 5
"""Attempts at one item after which, if the store answers otherwise, the item is set aside."""
LINKED_FROM = 1 << 20
"""Bytes from which a file is linked, not copied: checkpoints, which are replaced and never written into."""
JOURNAL = "unsent.jsonl"


class Refused(Exception):
    """The store answered and will not take the item, now or later; the message gives the reason."""


@dataclass(frozen=True)
class Item:
    """One result. ``content``: plain values. ``file``: path of its copy in the outbox, or None. ``again``: an earlier
    attempt may have arrived. ``earlier``: it is from an earlier process."""

    kind: str
    content: Mapping[str, Any]
    file: Path | None
    again: bool = False
    earlier: bool = False

    @property
    def name(self) -> str:
        """What it is, for messages: ``metrics``, or the name of the file."""
        return self.kind if self.file is None else self.file.name


@dataclass(frozen=True)
class Unsent:
    """What never arrived, and the first line of the store's error for it, or for the last attempt."""

    items: tuple[Item, ...]
    reason: str
    journal: Path


@dataclass
class _Entry:
    number: int
    item: Item
    refused: str | None = None

    def as_line(self, folder: Path) -> str:
        item = self.item
        path = {} if item.file is None else {"file": item.file.relative_to(folder).as_posix()}
        refused = {} if self.refused is None else {"refused": self.refused}
        return json.dumps({"kind": item.kind, **item.content, **path, **refused}) + "\n"


class Outbox:
    """The queue of one run. One thread puts and closes, another one delivers."""

    def __init__(
        self,
        folder: Path,
        deliver: Callable[[Item], None],
        *,
        answers: Callable[[], bool],
        report: Callable[[str], None],
        store: str,
    ) -> None:
        """deliver: raises Refused for an item that will never be taken, anything else for one to try again.
        answers: whether the store answers at all. report: prints when the store is lost and when it is back, under the
        name ``store``.
        """
        self._folder, self._deliver, self._answers, self._report, self._store = folder, deliver, answers, report, store
        self._change = threading.Condition()
        self._waiting: deque[_Entry] = deque()
        self._refused: list[_Entry] = []
        self._closed = self._abandoned = False
        self._failing_since: float | None = None
        self._away = False
        self._set_aside: set[str] = set()
        self._reason = ""
        self._count = 0
        self._made_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        for kind, content, file in _left_by_an_earlier_process(folder):
            self._count += 1
            self._waiting.append(_Entry(self._count, Item(kind, content, file, again=True, earlier=True)))
        if self._waiting:
            # Whole lines again: the earlier process may have ended in the middle of one.
            self._rewrite(list(self._waiting))
        # New files get folders numbered after those that are there.
        self._count = max([self._count, *(int(path.name) for path in (folder / "files").glob("[0-9]*"))])
        # A daemon: a thread that waits for an answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, kind: str, content: Mapping[str, Any], file: Path | None = None) -> None:
        """Take an item and return at once. ``file`` is stored as it is now; the original may be removed or replaced.

        On a full disk a file is left out, which is reported: it must not end the work.
        """
        with self._change:
            self._count += 1
            own_folder = self._folder / "files" / f"{self._count:06d}"
            try:
                stored = None if file is None else _store_copy(file, own_folder)
            except OSError as error:
                if file is not None and not file.is_file():
                    raise
                shutil.rmtree(own_folder, ignore_errors=True)
                self._report(f"{file.name if file else kind} is not sent to {self._store}: {first_line(error)}")
                return
            entry = _Entry(self._count, Item(kind, content, stored))
            self._waiting.append(entry)
            # A full disk must not end the work: the item is in memory too.
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / JOURNAL).open("a", encoding="utf-8") as journal:
                    journal.write(entry.as_line(self._folder))
            self._change.notify_all()

    def wait(self, *, patience: float) -> None:
        """Wait until all is delivered, or the store has failed for ``patience`` seconds. No ``put`` may follow."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        started = time.monotonic()
        while self._thread.is_alive():
            since = self._failing_since
            left = patience if since is None else patience - (time.monotonic() - max(started, since))
            if left <= 0 and since is not None:
                return
            self._thread.join(min(max(left, 0.01), 0.2))

    def close(self) -> Unsent | None:
        """Stop delivering and return what never arrived; None when all did."""
        with self._change:
            self._abandoned = True
            self._change.notify_all()
            entries = sorted([*self._refused, *self._waiting], key=lambda entry: entry.number)
            if not entries:
                _remove(self._folder, self._made_folders[1:])
                return None
            self._rewrite(entries)
            reason = next((entry.refused for entry in entries if entry.refused is not None), self._reason)
            return Unsent(tuple(entry.item for entry in entries), reason, self._folder / JOURNAL)

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            refused = self._attempt(entry)
            with self._change:
                if self._abandoned:
                    return
                self._waiting.popleft()
                if refused is not None:
                    self._report(f"{self._store} does not take {entry.item.name}: {refused}")
                    entry.refused = refused
                    self._refused.append(entry)
                elif entry.item.file is not None:
                    shutil.rmtree(entry.item.file.parent, ignore_errors=True)
                if not self._waiting:
                    self._rewrite(self._refused)

    def _next(self) -> _Entry | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed or self._abandoned)
            return self._waiting[0] if self._waiting and not self._abandoned else None

    def _attempt(self, entry: _Entry) -> str | None:
        """Try until the item has arrived or is refused: the reason then. Ends without either when abandoned."""
        failures = 0
        while True:
            try:
                self._deliver(entry.item)
            except Refused as error:
                return str(error)
            except Exception as error:
                failures += 1
                reason = first_line(error)
                # A store that is away answers late, so it is seldom asked.
                answers = (not self._away or failures >= ATTEMPTS) and self._answers()
                self._note_failure(entry.item, reason, answers=answers)
                entry.item = replace(entry.item, again=True)
                if answers and (failures >= ATTEMPTS or entry.item.kind in self._set_aside):
                    self._failing_since, self._away = None, False
                    self._set_aside.add(entry.item.kind)
                    return reason
                if self._pause(PAUSES[min(failures, len(PAUSES)) - 1]):
                    return None
            else:
                self._note_success()
                self._set_aside.discard(entry.item.kind)
                return None

    def _note_failure(self, item: Item, reason: str, *, answers: bool) -> None:
        self._reason = reason
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        if not answers and not self._away:
            self._away = True
            self._report(
                f"{self._store} is out of reach; results wait in {self._folder}, the work continues ({reason})"
            )
        elif answers and not item.again and item.kind not in self._set_aside:
            self._report(f"{self._store} answers, but cannot store {item.name}; it is tried again ({reason})")

    def _note_success(self) -> None:
        if self._failing_since is not None:
            away = time.monotonic() - self._failing_since
            self._failing_since = None
            if self._away:
                self._away = False
                self._report(f"{self._store} answers again after {away:.0f} s; waiting results are being sent")

    def _pause(self, seconds: float) -> bool:
        """Pause; returns whether to give up."""
        with self._change:
            return self._change.wait_for(lambda: self._abandoned, timeout=seconds)

    def _rewrite(self, entries: list[_Entry]) -> None:
        with contextlib.suppress(OSError):
            if entries:
                with atomic_file(self._folder / JOURNAL) as whole:
                    whole.write_text("".join(entry.as_line(self._folder) for entry in entries), encoding="utf-8")
            else:
                (self._folder / JOURNAL).unlink(missing_ok=True)


def _remove(folder: Path, parents: list[Path]) -> None:
    """Remove the folder, and those above it that were made for it and hold nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for path in parents:
            path.rmdir()


def _store_copy(file: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.name
    if file.stat().st_size >= LINKED_FROM:
        with contextlib.suppress(OSError):
            os.link(file, path)
            return path
    shutil.copyfile(file, path)
    return path


def _left_by_an_earlier_process(folder: Path) -> list[tuple[str, dict[str, Any], Path | None]]:
    """Items of the journal; a last line that was cut off by the end of the process is left out."""
    if not (folder / JOURNAL).is_file():
        return []
    found = []
    for line in (folder / JOURNAL).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            content = json.loads(line)
            kind, file = content.pop("kind"), content.pop("file", None)
            content.pop("refused", None)
            path = None if file is None else folder / file
            if path is None or path.is_file():
                found.append((kind, content, path))
    return found
