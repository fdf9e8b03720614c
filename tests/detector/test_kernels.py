"""The kernels of a GPU, run by Triton's interpreter on the CPU, give the numbers of the operations of torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("kernels_in_interpreter.py")
CASES = (
    *("focal", "more classes than a tile", "cross-entropy", "by class", "equalized", "ancestors known"),
    *("ancestors learned", "regions", "giou", "normaliser", "no box", "bfloat16", "float16"),
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_torch(case: str, found: Any) -> None:
    values = found["cases"][case]
    for name in ("class_loss", "box_loss", "num_positives"):
        plain, fused = values[name]
        assert fused == pytest.approx(plain, rel=1e-5), name
    # One rounding of the type of the gradient.
    rounding = {"bfloat16": 2**-7, "float16": 2**-9}.get(case, 2e-5)
    for name in ("class_gradient", "box_gradient", "class_gradients"):
        difference, largest, _ = values[name]
        assert difference <= rounding * largest, name
    assert (values["num_positives"][0] > 0) is (case != "no box")
    assert values["class_gradient"][1] > 0


def test_the_group_of_regions_of_the_case_silence_something(found: Any) -> None:
    assert found["cases"]["regions"]["class_loss"][0] < 0.999 * found["cases"]["ancestors known"]["class_loss"][0]


def test_anchors_are_matched_to_the_same_boxes(found: Any) -> None:
    assert {case: equal for case, (equal, _) in found["matching"].items()} == dict.fromkeys(found["matching"], True)
    assert [positives > 0 for _, positives in found["matching"].values()] == [True, True, False, True]


def test_a_logit_that_is_not_a_number_makes_the_loss_none(found: Any) -> None:
    assert all(math.isnan(loss) for loss in found["nan"])


def test_the_kernels_compile_for_an_h100_without_one() -> None:
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from retinaflow.detector import kernels

def build(kernel, constants, **types):
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

boxes = dict(anchors="*fp32", boxes="*fp32", bounds="*i32", best_of_box="*fp32")
build(kernels._best_of_box, {"BLOCK": 256}, **boxes, num_anchors="i32")
build(kernels._match, {"BLOCK": 256}, **boxes, matched="*i32", num_anchors="i32", high="fp32", low="fp32")
build(kernels._multiply, {"BLOCK": 8192}, values="*bf16", factor="*fp32", count="i32")
flags = ("HAS_LINEAGE", "LEARN_ANCESTORS", "HAS_REGIONS", "WITH_GRADIENT", "WITH_SUMS")
floats = ("losses", "sums", "gamma", "positive_weight", "negative_weight", "scale", "anchors", "region_boxes")
for on in (False, True):
    build(
        kernels._focal, {"K": 264, "ROWS": 32, "WIDTH": 32, **dict.fromkeys(flags, on), "WITH_GRADIENT": True},
        logits="*bf16", gradient="*bf16", labels="*i32", negatives="*u8", lineage="*u8", related="*u8",
        region_classes="*i64", region_bounds="*i32", num_anchors="i32", ioa="fp32", **dict.fromkeys(floats, "*fp32"),
    )
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
