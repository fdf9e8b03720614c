"""``compile=true``: the network through ``torch.compile``, and a clear error where that cannot work.

The first steps of each image shape take a minute or more while kernels are built, so it pays in long trainings of few
shapes only. Names in the state dict stay as they are: a checkpoint of a compiled network is like any other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from torch import nn

from retinaflow.errors import SettingError

SHAPES = 64
"""Image shapes that are compiled at most; torch gives up after 8 unless it is given a number."""


def compile_network(network: nn.Module, device: torch.device, *, batch_size: int) -> None:
    """Compile a network in place. Raises SettingError where the machine cannot compile, before any image is read.

    Each image shape is compiled once, for training in batches of ``batch_size``. Smaller batches, which end an epoch,
    and evaluation are computed without, because each would be compiled anew.
    """
    try:
        # Compiling two operations shows at once whether there is a compiler.
        torch.compile(_two_operations)(torch.ones(8, device=device))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        wanted = "g++" if device.type == "cpu" else "gcc and Triton"
        raise SettingError(
            f"compile=true needs a compiler that torch can use ({wanted}), but: {reason}. "
            "Install one, or use compile=false"
        ) from error
    torch._dynamo.config.cache_size_limit = max(SHAPES, torch._dynamo.config.cache_size_limit)
    plain = network._call_impl
    compiled = torch.compile(plain, dynamic=False)

    def call(images: torch.Tensor) -> Any:
        whole = network.training and len(images) == batch_size
        return (compiled if whole else plain)(images)

    # As nn.Module.compile does; copies of the network do without.
    network._compiled_call_impl = call


def _two_operations(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
