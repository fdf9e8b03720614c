"""Precision: what auto means on which machine, and what the context computes in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retinaflow.detector import device
from retinaflow.detector.device import autocast, fast_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETINAFLOW_AUTO_PRECISION")


@pytest.mark.parametrize("stated", ["float32", "bfloat16"])
def test_the_environment_states_what_auto_means(monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
    monkeypatch.setenv("RETINAFLOW_AUTO_PRECISION", stated)
    assert fast_precision(CPU) == stated


def test_the_environment_cannot_state_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINAFLOW_AUTO_PRECISION", "float16")
    with pytest.raises(ValueError, match="must be float32 or bfloat16, but got 'float16'"):
        fast_precision(CPU)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        pytest.param({"avx512_bf16": True}, "bfloat16", id="AVX512-BF16"),
        pytest.param({"amx_bf16": True}, "bfloat16", id="AMX"),
        pytest.param({"avx2": True, "avx512_bf16": False}, "float32", id="AVX2"),
        pytest.param({}, "float32", id="unknown"),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_precision(CPU) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", "bfloat16", id="AVX512-BF16"),
        pytest.param("flags : fpu amx_bf16 amx_tile\nflags : fpu\n", "bfloat16", id="AMX"),
        pytest.param("model name : avx512_bf16\nflags : fpu avx2\n", "float32", id="AVX2"),
        pytest.param("Features : fp asimd\n", "float32", id="no flags"),
        pytest.param(None, "float32", id="no such file"),
    ],
)
def test_a_torch_that_cannot_be_asked_goes_by_the_flags_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str | None, expected: str
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines)
    assert fast_precision(CPU) == expected


@pytest.mark.parametrize(
    ("major", "expected"), [(7, "float32"), (8, "bfloat16"), (9, "bfloat16")], ids=["Volta", "Ampere", "Hopper"]
)
def test_auto_on_a_gpu_goes_by_its_generation(monkeypatch: pytest.MonkeyPatch, major: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 5))
    assert fast_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_network_computes_in_the_precision_and_keeps_its_weights_in_float32(
    precision: str, dtype: torch.dtype
) -> None:
    layer = torch.nn.Linear(3, 2)
    with autocast(CPU, precision):  # type: ignore[arg-type]
        assert layer(torch.ones(1, 3)).dtype == dtype
    assert layer.weight.dtype == torch.float32


OPEN_FILES = """
import resource, sys
import torch
from retinaflow.detector.device import FILES_PER_WORKER, loader_workers, open_files_left
soft, hard = (int(word) for word in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
left = open_files_left()
print(left, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
most = left // FILES_PER_WORKER
print(loader_workers(most, torch.device("cpu")) == most)
loader_workers(most + 1, torch.device("cpu"))
"""


@pytest.mark.parametrize(("soft", "hard"), [(100, 400), (90, 90)], ids=["a limit to raise", "a low limit"])
def test_workers_that_the_limit_of_open_files_does_not_allow_are_refused(soft: int, hard: int) -> None:
    """Above it torch's loader ends with a traceback, or hangs."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_FILES, str(soft), str(hard)], capture_output=True, text=True, check=False
    )
    left, now, fits = done.stdout.split()
    assert int(now) == hard
    assert 0 <= int(left) <= hard - device.FILES_OF_A_COMMAND
    assert fits == "True"
    possible = int(left) // device.FILES_PER_WORKER
    assert f"workers={possible + 1} needs {(possible + 1) * device.FILES_PER_WORKER} open files" in done.stderr
    assert f"give at most workers={possible}" in done.stderr
