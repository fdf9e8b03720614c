"""Files and folders that are whole or absent, locks, and calls that are made again."""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from retinaflow.errors import DataError, shown
from retinaflow.files import (
    atomic_file,
    atomic_folder,
    growing_waits,
    lock,
    read_json,
    read_text,
    read_yaml,
    remove_partial_files,
    retry,
)


def holding(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Files


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "table.csv") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "new" / "table.csv").exists()
    assert holding(tmp_path) == ["new/table.csv"]


def test_after_an_error_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("old")

    def fail() -> None:
        with atomic_file(tmp_path / "table.csv") as partial:
            partial.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (tmp_path / "table.csv").read_text() == "old"
    assert holding(tmp_path) == ["table.csv"]


def test_what_a_killed_process_left_is_overwritten_or_removed(tmp_path: Path) -> None:
    for name in ("table.csv", "other.csv"):
        (tmp_path / f".{name}.partial").write_text("half a file, longer than the whole")
    with atomic_file(tmp_path / "table.csv") as partial:
        partial.write_text("whole")
    remove_partial_files(tmp_path)
    assert (tmp_path / "table.csv").read_text() == "whole"
    assert holding(tmp_path) == ["table.csv"]


# Folders


def test_a_folder_appears_whole_and_an_empty_one_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with atomic_folder(tmp_path / "set") as partial:
        (partial / "a").write_text("a")
        assert holding(tmp_path / "set") == []
    assert holding(tmp_path) == ["set/a"]


def test_after_an_error_there_is_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "set") as partial:
            (partial / "a").write_text("a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_anything_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "set") as partial:
        (partial / "new").write_text("new")
    assert holding(tmp_path) == ["set/old"]
    with atomic_folder(tmp_path / "set", replace=True) as partial:
        (partial / "new").write_text("new")
    assert holding(tmp_path) == ["set/new"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/set")
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert holding(tmp_path / "disk") == ["set/new"]


def test_a_mounted_folder_is_filled_when_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)

    def fail() -> None:
        with atomic_folder(volume) as partial:
            (partial / "half").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(volume.iterdir()) == []
    with atomic_folder(volume) as partial:
        (partial / "images").mkdir()
        (partial / "images" / "a").write_text("a")
        assert holding(tmp_path) == [f"volume/{partial.name}/images/a"]
    assert holding(tmp_path) == ["volume/images/a"]
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(volume):
        pass
    assert holding(tmp_path) == ["volume/images/a"]


def test_when_the_exchange_fails_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "set") as partial:
        (partial / "old").write_text("old")
    rename = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target.name == "set" and (self / "new").exists():
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="refused"), atomic_folder(tmp_path / "set", replace=True) as partial:
        (partial / "new").write_text("new")
    assert holding(tmp_path) == ["set/old"]


def test_folders_of_ended_processes_are_removed_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    mine, theirs, elsewhere = (
        tmp_path / f".set.partial-{machine}-{process}-00"
        for machine, process in (
            (platform.node(), int(ended.stdout)),
            (platform.node(), os.getppid()),
            ("another", int(ended.stdout)),
        )
    )
    for folder in (mine, theirs, elsewhere):
        folder.mkdir()
    with atomic_folder(tmp_path / "set"), atomic_folder(tmp_path / "set", replace=True):
        pass
    assert sorted(path for path in tmp_path.iterdir() if path.name != "set") == sorted([theirs, elsewhere])


# Locks


def hold(path: Path, holding: Event, enough: Event) -> None:
    with lock(path):
        holding.set()
        enough.wait(30)


def test_a_lock_is_held_by_one_process_and_released_by_its_end(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    taken, enough = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lock", taken, enough))
    process.start()
    assert taken.wait(30)
    with pytest.raises(BlockingIOError, match="another process holds this lock"), lock(tmp_path / "lock", wait=False):
        pass
    calls = []

    def end_the_other() -> None:
        calls.append("waiting")
        process.kill()

    with lock(tmp_path / "lock", before_wait=end_the_other):
        assert calls == ["waiting"]
    process.join()
    with lock(tmp_path / "lock", wait=False, before_wait=end_the_other):
        assert calls == ["waiting"]


def test_a_lock_that_cannot_be_made_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock(tmp_path / "file" / "lock"):
        pass


# Retry


def failing(times: int, error: type[Exception] = OSError) -> Callable[[], str]:
    left = iter(range(times))

    def call() -> str:
        if next(left, None) is not None:
            raise error("away")
        return "here"

    return call


def test_a_call_is_made_again_after_each_wait() -> None:
    slept: list[float] = []
    assert retry(failing(2), waits=[1, 2, 3], may_pass=lambda error: True, sleep=slept.append) == "here"
    assert slept == [1, 2]


def test_the_last_error_is_raised_when_the_waits_are_used_up() -> None:
    slept: list[float] = []
    with pytest.raises(OSError, match="away"):
        retry(failing(3), waits=[1, 2], may_pass=lambda error: True, sleep=slept.append)
    assert slept == [1, 2]


def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    slept: list[float] = []
    with pytest.raises(KeyError):
        retry(failing(1, KeyError), waits=[1], may_pass=lambda error: isinstance(error, OSError), sleep=slept.append)
    assert slept == []


def test_waits_double_up_to_the_longest_and_may_be_spread() -> None:
    assert list(growing_waits(1, 5, count=5)) == [1, 2, 4, 5, 5]
    spread = list(growing_waits(1, 5, count=100, spread=random.Random(0)))
    assert all(0.5 <= wait <= 5 for wait in spread)
    assert len(set(spread)) == 100


def test_waits_end_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    waits = growing_waits(1, 5, patience=7)
    found = []
    for wait in waits:
        found.append(wait)
        now += wait
    assert found == [1, 2, 4, 5], "the last wait begins within the patience"


# Text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_read_in_every_unicode_encoding_with_a_mark_and_with_any_line_ends(
    tmp_path: Path, encoding: str, end: str
) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(f"Straße{end}猫\u2028😀{end}".encode(encoding))
    assert read_text(path) == "Straße\n猫\u2028😀\n"


UNREADABLE = {
    "cp1252": ("cat\nStraße\n".encode("cp1252"), r"a\.txt line 2: .* but the byte 0xdf is not; save it as UTF-8"),
    "cut": ("cat\n猫".encode()[:-1], r"a\.txt line 2: .* but the byte 0xe7 is not"),
    "utf-16 without a mark": ("cat\n".encode("utf-16-le"), r"a\.txt: .* but holds zero bytes; save it as UTF-8"),
    "half of utf-16": ("cat\n".encode("utf-16")[:-1], r"a\.txt: the file must be text in UTF-8, or in UTF-16"),
}


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_unicode_text_is_named_with_the_line(tmp_path: Path, case: tuple[bytes, str]) -> None:
    (tmp_path / "a.txt").write_bytes(case[0])
    with pytest.raises(DataError, match=case[1]):
        read_text(tmp_path / "a.txt")


def test_merge_keys_may_bring_the_same_key_twice_and_do_not_multiply(tmp_path: Path) -> None:
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], y: {n}}}" for n in range(1, 12)]
    (tmp_path / "a.yaml").write_text("\n".join(["a0: &a0 {x: 1, y: 0}", *lines]))
    assert read_yaml(tmp_path / "a.yaml")["a11"] == {"x": 1, "y": 11}


def test_yaml_is_typed_or_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("names: [on, 010, 12:30, 1_000, null]\ntest:\n")
    assert read_yaml(tmp_path / "a.yaml") == {"names": [True, 8, 750, 1000, None], "test": None}
    expected = {"names": ["on", "010", "12:30", "1_000", "null"], "test": ""}
    assert read_yaml(tmp_path / "a.yaml", as_written=True) == expected


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "line 1: not a readable YAML file"),
        ("a: 1\nb: 2\na: 3", "line 3: .*the key a is given twice"),
        ("[" * 100_000, "nested too deep"),
        (f"a: {'9' * 5000}", "not a readable YAML file"),
        ("? [1, 2]\n: 3\n? {}\n: 4", "not a readable YAML file"),
        ("a: 2001-99-99", "not a readable YAML file"),
        ("!!python/object/apply:os.system ['true']", "not a readable YAML file"),
        ("a: !!int ''", "a value does not fit its tag"),
        ("a: !!bool maybe", "a value does not fit its tag"),
        ("a: !!timestamp soon", "a value does not fit its tag"),
        ('a: "\\ud800"', "half of a character"),
        ("a: " + "x" * 3_000_000, "must have at most 2,097,152 characters, but has 3,000,003"),
    ],
    ids=["open", "twice", "deep", "long number", "key", "date", "python", "int", "bool", "time", "half", "large"],
)
def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"a\.yaml.*{problem}") as refused:
        read_yaml(tmp_path / "a.yaml")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1,\n"b"}', "line 2: not a readable JSON file"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "not a readable JSON file"),
        ("", "line 1: not a readable JSON file"),
        (r'["\ud800"]', "half of a character"),
        (r'{"\uDFFF": 1}', "half of a character"),
    ],
    ids=["colon", "deep", "long number", "empty", "half", "half of a name"],
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json.*{problem}"):
        read_json(tmp_path / "a.json")


def test_two_halves_of_a_character_are_that_character(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(r'["\ud83d\ude00", "\\ud800"]')
    assert read_json(tmp_path / "a.json") == ["😀", "\\ud800"]
    assert read_yaml(tmp_path / "a.json") == read_yaml(tmp_path / "a.json", as_written=True) == ["😀", "\\ud800"]


def test_a_value_is_cut_before_it_is_formatted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(LAUGHS)
    # Written out the last list has 2 x 9^11 texts.
    value = read_yaml(tmp_path / "a.yaml")["a11"]
    assert len(shown(value)) == 100
    assert shown("x" * 10**6, quotes=False) == "x" * 97 + "..."
    assert shown(1 << 20_000) == "an integer of 20,001 bits"
    assert (shown("a"), shown("a", quotes=False), shown([1, {"b": None}])) == ("'a'", "a", "[1, {'b': None}]")
