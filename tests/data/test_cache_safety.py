"""The cache under real trouble: builders side by side, killed, out of disk, and inputs that change meanwhile.

Each trial runs in processes of its own: one Python that has imported everything forks the actors, so that a kill is a
real SIGKILL and a lock a real lock, at the price of one start of Python.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_index import TinyDataset

from retinaflow.data.cache import load_index
from retinaflow.data.openimages import SourceFiles, find_files

PRELUDE = """
import os, resource, signal, shutil, sys, time
from pathlib import Path
import numpy as np
from retinaflow.data import cache
from retinaflow.data.openimages import find_files

folder, place = Path(sys.argv[1]), Path(os.environ["RETINAFLOW_CACHE"])
files = find_files(folder, ["train"])

def load(said):
    return cache.load_index(files, [folder / "images"], report=said.append).index

def in_child(work):
    "What a forked child answers (text), or the signal that ended it."
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(there, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(there)
    return child, here

def answer(child, here):
    text = b"".join(iter(lambda: os.read(here, 1 << 16), b"")).decode()
    os.close(here)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else text

def loaded():
    said = []
    return f"{load(said).digest}|{' / '.join(said)}"

def left_over():
    return [path.name for path in (place / "index").iterdir() if path.name.startswith(".")]
"""

TWO_BUILDERS = """
read = cache.read_annotations
def slowly(*given, **named):
    time.sleep(0.7)
    return read(*given, **named)
cache.read_annotations = slowly
first, second = [in_child(loaded) for _ in range(2)]
one, two = answer(*first).split("|"), answer(*second).split("|")
assert one[0] == two[0], (one, two)
waited = ["another process is building" in said for said in (one[1], two[1])]
built = ["train-annotations-bbox.csv: " in said for said in (one[1], two[1])]
assert sorted(waited) == [False, True], (one, two)
assert built == [not wait for wait in waited], (one, two)
assert len(list((place / "index").iterdir())) == 1
"""

KILLED = """
def killed_at(number):
    "Load, killed by SIGKILL at the n-th step of writing: before or after a call, or with half a file written."
    count = 0
    def step(path=None):
        nonlocal count
        count += 1
        if count == number:
            if path is not None:
                Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
    def wrapped(call, path_of):
        def stepped(*given, **named):
            step()
            step(path_of(given))
            result = call(*given, **named)
            step()
            return result
        return stepped
    np.save = wrapped(np.save, lambda given: given[0])
    Path.write_text = wrapped(Path.write_text, lambda given: given[0])
    Path.replace = wrapped(Path.replace, lambda given: None)
    return loaded()

whole = answer(*in_child(loaded)).split("|")[0]
kills = 0
while True:
    shutil.rmtree(place)
    found = answer(*in_child(lambda: killed_at(kills + 1)))
    if not isinstance(found, int):
        break
    assert found == -signal.SIGKILL
    kills += 1
    digest, said = answer(*in_child(loaded)).split("|")
    assert digest == whole, kills
    assert "not cached" not in said
    assert left_over() == [], (kills, left_over())
    assert answer(*in_child(loaded)).split("|") == [whole, ""], "what was built after the kill is whole"
print(kills)
"""

FULL_DISK = """
def without_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    return loaded()
digest, said = answer(*in_child(without_room)).split("|")
assert "the index is not cached: " in said, said
assert left_over() == []
again, said = answer(*in_child(loaded)).split("|")
assert again == digest
assert "not cached" not in said
assert answer(*in_child(loaded)).split("|") == [digest, ""]
"""


def act(script: str, folder: Path, cache: Path) -> str:
    code = PRELUDE + script
    environment = {"RETINAFLOW_CACHE": str(cache), "PATH": "", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, check=False, cwd=root, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_two_processes_that_start_at_once_one_builds_and_both_have_the_index(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    act(TWO_BUILDERS, tiny_dataset(), tmp_path / "cache")


@pytest.mark.slow
def test_after_a_kill_at_any_step_of_writing_the_next_start_has_the_right_index(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    kills = int(act(KILLED, tiny_dataset(train=4), tmp_path / "cache"))
    assert kills >= 3 * (10 + 1 + 1), "before, in and after every column, the document and the renaming"


def test_a_full_disk_leaves_nothing_behind_and_the_index_in_memory_is_right(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    act(FULL_DISK, tiny_dataset(), tmp_path / "cache")


@pytest.mark.parametrize("name", ["train-annotations-bbox.csv", "class-descriptions.csv"])
def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_is_cached(
    name: str, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path / "cache"))
    folder = tiny_dataset()
    files: SourceFiles = find_files(folder, ["train"])

    def download_goes_on(text: str) -> None:
        del text
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n")

    with pytest.raises(ValueError, match="the files must not change while they are read"):
        load_index(files, [folder / "images"], report=download_goes_on)
    assert not (tmp_path / "cache" / "index").exists()
