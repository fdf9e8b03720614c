"""What a training takes of its machine: peak memory, and the use of processor, memory and GPU while it runs.

Names are those of MLflow's own system metrics, so ``mlflow ui`` shows them under its tab of that name. They are logged
like every other metric, in order and through the same store, not by a thread of MLflow's.
"""

from __future__ import annotations

import sys

import psutil
import torch

MIB = 1 << 20


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU that it trains on, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def system_metrics(device: torch.device) -> dict[str, float]:
    """Use of the machine since the last call (processor) and now (memory)."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        found["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
    return found
