"""``compile=true``: the network through ``torch.compile``, and a clear error where that cannot work.

The first steps of each image shape take a minute or more while kernels are built, so it pays in long trainings of few
shapes only. Names in the state dict stay as they are: a checkpoint of a compiled network is like any other.
"""

from __future__ import annotations

import torch
from torch import nn

from retinaflow.errors import SettingError


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile a network in place. Raises SettingError where the machine cannot compile, before any image is read."""
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
    network.compile()


def _two_operations(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
