"""Memory of reading: bounded by the rows that stay, however long the file is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
from pathlib import Path
from retinaflow.data.openimages import find_files, read_annotations
from retinaflow.data.tables import RowErrors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
errors = RowErrors("drop")
index = read_annotations(find_files(Path(sys.argv[1]), ["train"]), errors, progress=lambda line: None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(index.boxes), errors.count, errors.left_out, (peak - before) // 1024)
"""
ROWS = 1_500_000
BROKEN = {
    "labels of other classes": ("", "".join(f"{n:016x},verification,/m/0q{n % 20000},{n & 1}\n" for n in range(1000))),
    "no area": ("".join(f"{n:016x},/m/car,0.5,0.4,0.1,0.2\n" for n in range(1000)), ""),
    "text in a number": ("".join(f"{n:016x},/m/car,left,0.4,0.1,0.2\n" for n in range(1000)), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_millions_of_rows_that_do_not_stay_take_no_memory_of_their_own(case: tuple[str, str], tmp_path: Path) -> None:
    boxes, labels = (part * (ROWS // 1000) for part in case)
    (tmp_path / "class-descriptions.csv").write_text("/m/car,Car\n")
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax\na,/m/car,0.1,0.2,0.1,0.2\n"
    (tmp_path / "train-annotations-bbox.csv").write_text(header + boxes)
    (tmp_path / "train-annotations-human-imagelabels.csv").write_text(f"ImageID,Source,LabelName,Confidence\n{labels}")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    kept, broken, left_out, megabytes = map(int, done.stdout.split())
    assert (kept, broken + left_out) == (1, ROWS)
    # Blocks of 32 MB and what pyarrow makes of one; 1.5 million rows as objects would take more than this.
    assert megabytes < 600
