"""Where a process computes: its device, the precision that the device is fast at, and the number of loader processes.

Only here do ``precision=auto`` and ``workers=-1`` become values. bfloat16 pays only where the processor
multiplies it in hardware (AVX512-BF16 or AMX on x86, compute capability 8 on NVIDIA); elsewhere it is emulated and
slower than float32. Weights, optimizer and losses stay float32 in both.
"""

from __future__ import annotations

import contextlib
import os
import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from retinaflow.errors import SettingError

Precision = Literal["float32", "bfloat16"]
CPU_INFO = Path("/proc/cpuinfo")
AUTO_PRECISION = "RETINAFLOW_AUTO_PRECISION"
"""Environment variable that states what ``precision=auto`` means, so that several machines compute alike."""
OPEN_FILES = Path("/proc/self/fd")
FILES_OF_A_COMMAND = 32
"""Files that a command opens besides those of its loader: checkpoints, its results, connections."""
FILES_PER_WORKER = 24
"""Two batches on their way, each of 9 tensors that are files in shared memory, and the pipes of the process."""
MAX_WORKERS = 8
"""Loader processes that ``workers=-1`` starts at most."""


def device_of(rank: int = 0) -> torch.device:
    """The device of the ``rank``-th process of this machine: the GPUs in turn, else the CPU."""
    count = torch.cuda.device_count()
    return torch.device("cuda", rank % count) if count else torch.device("cpu")


def precision_on(device: torch.device, setting: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """The precision that a setting means on a device. Errors as of :func:`fast_precision`."""
    return fast_precision(device) if setting == "auto" else setting


def loader_workers(workers: int, device: torch.device) -> int:
    """The loader processes that the setting ``workers`` means: -1 is one per thread of this process, at most
    ``MAX_WORKERS``, and none without a GPU.

    Raises SettingError for more than the system lets this process open files for; a loader would hang.
    """
    possible = open_files_left() // FILES_PER_WORKER
    if workers > possible:
        raise SettingError(
            f"workers={workers} needs {workers * FILES_PER_WORKER} open files, but the system leaves this process "
            f"{possible * FILES_PER_WORKER}; give at most workers={possible}, or raise the limit (ulimit -n)"
        )
    if workers >= 0:
        return workers
    return min(MAX_WORKERS, torch.get_num_threads(), possible) if device.type == "cuda" else 0


def open_files_left() -> int:
    """How many more files this process may open; its limit is raised as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    opened = len(list(OPEN_FILES.iterdir())) if OPEN_FILES.is_dir() else FILES_OF_A_COMMAND
    return max(soft - opened - FILES_OF_A_COMMAND, 0)


def fast_precision(device: torch.device) -> Precision:
    """What ``precision=auto`` means on a device. Raises SettingError when ``RETINAFLOW_AUTO_PRECISION`` is neither."""
    match os.environ.get(AUTO_PRECISION, ""):
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
        case "":
            pass
        case other:
            raise SettingError(f"{AUTO_PRECISION} must be float32 or bfloat16, but got {other!r}")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _flags(CPU_INFO)
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def _flags(path: Path) -> dict[str, bool]:
    """The processor's flags on Linux, for releases of torch that do not report them; empty elsewhere."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict.fromkeys(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []), True)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a network computes in that precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
