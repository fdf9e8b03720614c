"""compile=true: the same numbers under the same names, or a plain word."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch

from retinaflow.detector.network import RetinaNet
from retinaflow.settings.training_settings import NetworkSettings
from retinaflow.training.compilation import compile_network

CPU = torch.device("cpu")


def network() -> RetinaNet:
    return RetinaNet(NetworkSettings(backbone="resnet18", fpn_channels=64, head_depth=1, head_norm="group"), 3, seed=1)


@pytest.mark.parametrize(
    "fault", [RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand so on"), OSError()]
)
def test_a_machine_without_a_compiler_is_reported(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    words = (
        r"compile=true needs a compiler that torch can use \(g\+\+\), but: (Inv.*found|OSError)\. Install one, or use"
    )
    with pytest.raises(ValueError, match=words):
        compile_network(network(), CPU, batch_size=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on the PATH")
def test_a_compiled_network_gives_the_same_gradients_under_the_same_names() -> None:
    plain, compiled = network().train(), network().train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # What torch's own compiler warns of is not ours to mend.
        warnings.simplefilter("ignore")
        compile_network(compiled, CPU, batch_size=2)
        for model in (plain, compiled):
            output = model(images)
            (output.class_logits.square().sum() + output.box_deltas.square().sum()).backward()
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for (name, first), second in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert first.grad is not None
        scale = float(first.grad.abs().max())
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
