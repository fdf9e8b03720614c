"""Published files -> index: time and memory of ours beside a csv-module loop into dictionaries.

    python benchmarks/open_images.py --metadata METADATA --output DIR --scale 1.0
    python benchmarks/index.py --data DIR

Printed, each measured in a process of its own:

- building the index of all rows in DIR and saving it: wall seconds, CPU seconds (user and system, all threads; what
  stays when other work shares the machine), peak resident memory;
- opening it (the files in the page cache; median of 5), its size on disk;
- a loader worker, started by spawn and by fork, that reads the annotations of 20,000 random images: how much private
  memory it has more than before it had the index (private pages in ``/proc/self/smaps``). Pages of the index are
  mapped to be shared: they belong to the page cache, one copy for all processes, and are listed by themselves;
- on the first ``--rows`` box rows alone: ours, and a csv-module loop that makes a dictionary per box and a list per
  image, as is customary; then that loop scaled up to all rows of boxes and labels (a calculation, and said so).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from open_images import BOXES, CLASSES, HIERARCHY, LABELS

LOOKED_AT = 20_000


def main() -> None:
    arguments = parse()
    data: Path = arguments.data
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](data, arguments.scratch)))
        return
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    try:
        report_index(data, scratch)
        if arguments.keep:
            shutil.copytree(scratch / "index", arguments.keep)
        report_loop(data, scratch, arguments.rows)
    finally:
        shutil.rmtree(scratch)


def report_index(data: Path, scratch: Path) -> None:
    built = run_side("build", data, scratch)
    print(
        f"{built['images']:,} images, {built['boxes']:,} boxes, {built['labels']:,} labels -> index: "
        f"{built['seconds']:.1f} s, {built['cpu']:.1f} CPU s, peak {built['peak_gb']:.1f} GB"
    )
    opened = run_side("open", data, scratch)
    print(f"opening it: {opened['seconds']:.2f} s, {opened['cpu']:.2f} CPU s, {opened['gb']:.2f} GB on disk")
    for method in ("spawn", "fork"):
        worker = run_side(method, data, scratch)
        print(
            f"a worker started by {method}: {worker['private_mb']:.1f} MB private for the index, "
            f"{worker['mapped_mb']:.0f} MB of the page cache mapped"
        )


def report_loop(data: Path, scratch: Path, rows: int) -> None:
    part = scratch / "part"
    part.mkdir()
    for name in (CLASSES, HIERARCHY):
        shutil.copyfile(data / name, part / name)
    with (data / BOXES).open("rb") as source, (part / BOXES).open("wb") as target:
        target.writelines(islice(source, rows + 1))
    (part / LABELS).write_text("ImageID,Source,LabelName,Confidence\n", encoding="utf-8")
    ours, loop = run_side("build", part, part), run_side("loop", part, part)
    for name, side in (("ours", ours), ("csv loop", loop)):
        print(
            f"{name:<9} {rows:,} box rows: {side['cpu']:.2f} CPU s, {side['peak_gb'] - side['before_gb']:.2f} GB more"
        )
    print(f"{loop['cpu'] / ours['cpu']:.0f} times as fast")
    total = sum(count_lines(data / name) - 1 for name in (BOXES, LABELS))
    print(
        f"calculated for all {total:,} rows, the csv loop: {loop['cpu'] * total / rows:.0f} s, "
        f"{(loop['peak_gb'] - loop['before_gb']) * total / rows:.0f} GB, in every worker that copies it"
    )


def build(data: Path, scratch: Path) -> dict[str, float]:
    from retinaflow.data.openimages import find_files, read_annotations
    from retinaflow.data.tables import RowErrors

    before, start, cpu = peak_gb(), time.perf_counter(), time.process_time()
    index = read_annotations(find_files(data, ["train"]), RowErrors(), progress=lambda text: None)
    index.save(scratch / "index")
    counts = {"images": len(index), "boxes": len(index.boxes), "labels": len(index.verified_class)}
    seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return {**counts, **seconds, "peak_gb": peak_gb(), "before_gb": before}


def open_built(data: Path, scratch: Path) -> dict[str, float]:
    from retinaflow.data.index import AnnotationIndex

    del data
    seconds, cpu = [], time.process_time()
    for _ in range(5):
        start = time.perf_counter()
        AnnotationIndex.open(scratch / "index")
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / 5
    size = sum(file.stat().st_size for file in (scratch / "index").iterdir())
    return {"seconds": statistics.median(seconds), "cpu": cpu, "gb": size / 1e9}


def in_worker(method: str) -> Callable[[Path, Path], dict[str, float]]:
    def measure(data: Path, scratch: Path) -> dict[str, float]:
        from retinaflow.data.index import AnnotationIndex

        del data
        index = AnnotationIndex.open(scratch / "index")
        context: Any = multiprocessing.get_context(method)
        here, there = context.Pipe()
        given = pickle.dumps(index) if method == "spawn" else index
        process = context.Process(target=look_up, args=(there, given))
        process.start()
        result: dict[str, float] = here.recv()
        process.join()
        return result

    return measure


def look_up(answer: Connection, given: Any) -> None:
    import numpy as np

    # Imported first: the modules are no part of the memory of the index.
    from retinaflow.data.known_classes import known_classes

    before = private_bytes()
    index = pickle.loads(given) if isinstance(given, bytes) else given
    total = 0.0
    for image in np.random.default_rng(0).integers(0, len(index), LOOKED_AT):
        rows = slice(index.box_start[image], index.box_start[image + 1])
        total += (
            float(index.boxes[rows].sum()) + int(index.labels[rows].sum()) + int(known_classes(index, int(image)).sum())
        )
        total += float(index.sizes[image].sum()) + int(index.is_group_of[rows].sum())
    after = private_bytes()
    answer.send({f"{kind}_mb": (after[kind] - before[kind]) / 1e6 for kind in before})


def private_bytes() -> dict[str, int]:
    """Bytes of this process that no other can share, and those of files mapped to be shared."""
    private = mapped = 0
    is_shared = is_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            is_shared, is_file = values[0].endswith("s"), len(values) > 4 and values[4].startswith("/")
        elif is_shared:
            mapped += int(values[0]) * 1024 if name == "Rss:" else 0
        # Clean pages of files mapped by one process alone (libraries) are still the page cache's.
        elif name == "Private_Dirty:" or (name == "Private_Clean:" and not is_file):
            private += int(values[0]) * 1024
    return {"private": private, "mapped": mapped}


def loop(data: Path, scratch: Path) -> dict[str, float]:
    del scratch
    before, start, cpu = peak_gb(), time.perf_counter(), time.process_time()
    images: dict[str, list[dict[str, Any]]] = {}
    with (data / BOXES).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            box = [float(row[name]) for name in ("XMin", "YMin", "XMax", "YMax")]
            flags = {name: int(row[name]) for name in FLAGS}
            images.setdefault(row["ImageID"], []).append({"bbox": box, "label": row["LabelName"], **flags})
    seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return {**seconds, "peak_gb": peak_gb(), "before_gb": before}


FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
SIDES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "build": build,
    "open": open_built,
    "spawn": in_worker("spawn"),
    "fork": in_worker("fork"),
    "loop": loop,
}


def run_side(side: str, data: Path, scratch: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--scratch", str(scratch)]
    # A worker started by spawn finds the modules by this path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(here for here in import_path() if here)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def import_path() -> Iterable[str]:
    return (str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by open_images.py")
    parser.add_argument("--rows", type=int, default=500_000, help="box rows for the csv-module loop")
    parser.add_argument("--keep", type=Path, help="folder to copy the built index to, for sampling.py")
    parser.add_argument("--scratch", type=Path, help="where the index is built; the system's folder for such")
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
