"""benchmarks/gpu.py, small, on a CPU: every part runs and gives its rows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_runs_on_a_cpu() -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^\| ([a-f]): (.+?) \| (.+?) \|", done.stdout, flags=re.MULTILINE)
    assert {part for part, _, _ in table} == set("abcdef")
    agreement = [float(value) for _, what, value in table if what.startswith("loss and gradients")]
    assert agreement == [0.0]


def test_without_a_gpu_it_says_so() -> None:
    code = f"import runpy, sys; sys.argv = ['gpu.py']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    hidden = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; " + code
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "there is no GPU that torch can use; --dry_run" in done.stderr
