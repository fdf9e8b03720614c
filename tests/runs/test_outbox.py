"""The queue on disk: order, once, what is left, what an earlier process left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaflow.runs import outbox
from retinaflow.runs.outbox import Item, Outbox, Refused, Unsent


class Store:
    """Takes items unless told otherwise, and remembers what it was given."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int, str | None]] = []
        self.again: list[bool] = []
        self.fault: Callable[[Item], BaseException | None] = lambda item: None
        self.answers = True
        self.said: list[str] = []

    def deliver(self, item: Item) -> None:
        error = self.fault(item)
        if error is not None:
            raise error
        self.got.append((item.kind, item.content["n"], None if item.file is None else item.file.read_text()))
        self.again.append(item.again)

    def outbox(self, folder: Path) -> Outbox:
        return Outbox(folder, self.deliver, answers=lambda: self.answers, report=self.said.append, store="the store")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PAUSES", (0.01,))


@pytest.fixture
def store() -> Store:
    return Store()


def finish(box: Outbox, patience: float) -> Unsent | None:
    box.wait(patience=patience)
    return box.close()


def lines_of(unsent: Unsent | None) -> list[dict[str, object]]:
    assert unsent is not None
    return [json.loads(line) for line in unsent.journal.read_text(encoding="utf-8").splitlines()]


def test_items_arrive_in_order_and_nothing_is_left_on_disk(store: Store, tmp_path: Path) -> None:
    box = store.outbox(tmp_path / "out" / "unsent")
    for n in range(50):
        box.put("metrics", {"n": n})
    assert finish(box, 10) is None
    assert store.got == [("metrics", n, None) for n in range(50)]
    assert not any(store.again)
    assert not (tmp_path / "out").exists()


def test_an_empty_outbox_leaves_nothing(store: Store, tmp_path: Path) -> None:
    assert finish(store.outbox(tmp_path / "unsent"), 0) is None
    assert not (tmp_path / "unsent").exists()


def test_a_folder_that_holds_something_else_stays(store: Store, tmp_path: Path) -> None:
    box = store.outbox(tmp_path / "out" / "unsent")
    box.put("metrics", {"n": 0})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "own.txt").write_text("mine")
    assert finish(box, 10) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["own.txt"]


@pytest.mark.parametrize("linked_from", [0, 1 << 20], ids=["linked", "copied"])
def test_a_file_arrives_as_it_was_when_it_was_put(
    linked_from: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "LINKED_FROM", linked_from)
    gate = threading.Event()
    store.fault = lambda item: None if gate.wait(10) else TimeoutError()
    box = store.outbox(tmp_path / "unsent")
    path = tmp_path / "last.pt"
    for n, text in enumerate(("first", "second")):
        # Replaced, as checkpoints are, and then removed.
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(path)
        box.put("file", {"n": n}, path)
    path.unlink()
    gate.set()
    assert finish(box, 10) is None
    assert store.got == [("file", 0, "first"), ("file", 1, "second")]


def test_a_store_that_is_away_for_a_while_gets_everything_in_order_and_the_putting_never_waits(
    store: Store, tmp_path: Path
) -> None:
    away = threading.Event()
    away.set()
    store.fault = lambda item: ConnectionError("refused") if away.is_set() else None
    store.answers = False
    box = store.outbox(tmp_path / "unsent")
    start = time.perf_counter()
    for n in range(20):
        box.put("metrics", {"n": n})
    assert time.perf_counter() - start < 1
    time.sleep(0.1)
    assert store.got == []
    waiting = (tmp_path / "unsent" / "unsent.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in waiting] == list(range(20))
    away.clear()
    assert finish(box, 10) is None
    assert [n for _, n, _ in store.got] == list(range(20))
    # Only the one that was tried in vain may have arrived before.
    assert store.again == [True] + [False] * 19
    assert [text.split(";")[0].split(" after")[0] for text in store.said] == [
        "the store is out of reach",
        "the store answers again",
    ]


def test_what_never_arrived_lies_in_the_file_that_is_named(store: Store, tmp_path: Path) -> None:
    store.fault = lambda item: ConnectionError("no route\nto host") if item.content["n"] >= 2 else None
    store.answers = False
    (tmp_path / "table.csv").write_text("a,b")
    box = store.outbox(tmp_path / "unsent")
    for n in range(3):
        box.put("metrics", {"n": n})
    box.put("file", {"n": 3}, tmp_path / "table.csv")
    unsent = finish(box, 0.1)
    assert [n for _, n, _ in store.got] == [0, 1]
    assert lines_of(unsent) == [
        {"kind": "metrics", "n": 2},
        {"kind": "file", "n": 3, "file": "files/000004/table.csv"},
    ]
    assert unsent is not None
    assert unsent.reason == "no route"
    assert (unsent.journal.parent / "files/000004/table.csv").read_text() == "a,b"


def test_patience_counts_from_the_first_failure_and_a_slow_store_is_waited_for(store: Store, tmp_path: Path) -> None:
    store.fault = lambda item: time.sleep(0.1 * (item.content["n"] + 1))  # type: ignore[func-returns-value]
    box = store.outbox(tmp_path / "unsent")
    for n in range(3):
        box.put("metrics", {"n": n})
    assert finish(box, 0.05) is None
    assert len(store.got) == 3


@pytest.mark.parametrize("kind", ["refused", "failing while the store answers"])
def test_what_the_store_will_not_take_is_set_aside_and_the_rest_arrives(
    kind: str, store: Store, tmp_path: Path
) -> None:
    error = Refused("bad name") if kind == "refused" else RuntimeError("bad name")
    store.fault = lambda item: error if item.content["n"] == 1 else None
    box = store.outbox(tmp_path / "unsent")
    for n in range(3):
        box.put("metrics", {"n": n})
    unsent = finish(box, 10)
    assert [n for _, n, _ in store.got] == [0, 2]
    assert lines_of(unsent) == [{"kind": "metrics", "n": 1, "refused": "bad name"}]
    assert "the store does not take metrics: bad name" in store.said


def test_what_an_earlier_process_left_goes_first(store: Store, tmp_path: Path) -> None:
    store.fault = lambda item: ConnectionError()
    store.answers = False
    (tmp_path / "table.csv").write_text("old")
    first = store.outbox(tmp_path / "unsent")
    first.put("file", {"n": 0}, tmp_path / "table.csv")
    first.put("metrics", {"n": 1})
    unsent = finish(first, 0)
    assert unsent is not None
    with unsent.journal.open("a") as journal:
        journal.write('{"kind": "metr')  # as kill -9 leaves it
    store.fault = lambda item: None
    (tmp_path / "table.csv").write_text("new")
    second = store.outbox(tmp_path / "unsent")
    second.put("file", {"n": 2}, tmp_path / "table.csv")
    assert finish(second, 10) is None
    assert store.got == [("file", 0, "old"), ("metrics", 1, None), ("file", 2, "new")]
    assert store.again == [True, True, False]
    assert not (tmp_path / "unsent").exists()


def test_a_journal_that_cannot_be_written_loses_nothing_that_arrives(store: Store, tmp_path: Path) -> None:
    (tmp_path / "no folder").write_text("")
    box = store.outbox(tmp_path / "no folder" / "unsent")
    box.put("metrics", {"n": 0})
    assert finish(box, 10) is None
    assert store.got == [("metrics", 0, None)]


@pytest.mark.parametrize("step", ["the folder", "the copy"])
def test_a_file_that_finds_no_room_is_named_and_the_rest_arrives(
    step: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b")
    box = store.outbox(tmp_path / "unsent")
    with monkeypatch.context() as patch:
        if step == "the copy":
            patch.setattr(shutil, "copyfile", _no_room)
        else:
            patch.setattr(Path, "mkdir", _no_room)
        box.put("file", {"n": 0}, path)
    box.put("file", {"n": 1}, path)
    assert finish(box, 10) is None
    assert store.got == [("file", 1, "a,b")]
    assert store.said == ["table.csv is not sent to the store: [Errno 28] No space left on device"]
    assert not (tmp_path / "unsent").exists()


def test_a_file_that_is_not_there_is_a_bug_and_no_full_disk(store: Store, tmp_path: Path) -> None:
    box = store.outbox(tmp_path / "unsent")
    with pytest.raises(FileNotFoundError):
        box.put("file", {"n": 0}, tmp_path / "none.csv")
    assert finish(box, 10) is None


def _no_room(*_given: object, **_more: object) -> None:
    """As a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_closing_without_waiting_leaves_what_waits(store: Store, tmp_path: Path) -> None:
    """As when somebody interrupts the waiting."""
    gate = threading.Event()
    store.fault = lambda item: None if gate.wait(10) else TimeoutError()
    box = store.outbox(tmp_path / "unsent")
    box.put("metrics", {"n": 0})
    box.put("metrics", {"n": 1})
    unsent = box.close()
    gate.set()
    assert [line["n"] for line in lines_of(unsent)] == [0, 1]
