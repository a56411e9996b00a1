"""The Triton kernels of the DAU, without a GPU.

They are right in Triton's interpreter, compile for two GPUs, and are never a reason to fail.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.models.dau import fused, launches

INTERPRETED = Path(__file__).with_name("fused_interpreted.py")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    # Triton reads it when it is imported, hence a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED)]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[2]
    )
    assert run.returncode == 0, run.stdout + run.stderr


def compiled(layer, kinds):
    """Every distinct compilation of a layer: (launch, operand type)."""
    from benchmarks.triton_resources import launches_of

    found = {}
    for kind in kinds:
        for _, launch, operand in launches_of(layer, kind):
            found[launch.kernel, *launch.constants.items(), operand] = launch, operand
    return found.values()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("L-CoDA 9", ("fp32", "TF32", "bf16")),
        ("L-CoDA 2", ("TF32",)),
        ("hybrid 3x3 rank 8", ("fp32", "bf16")),
    ],
)
def test_compiles_without_a_gpu_and_without_spills(name, kinds, capability):
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.triton_resources import SHARED_MEMORY, compile_launch, hybrids, l_coda

    (layer,) = (layer for layer in [*l_coda(), *hybrids()] if layer.name == name)
    for launch, operand in compiled(layer, kinds):
        used = compile_launch(launch, operand, capability)
        assert used.spilled == 0, (launch, operand, used)
        assert used.shared <= SHARED_MEMORY, (launch, operand, used)


def test_compiles_without_bias_and_norm():
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.triton_resources import compile_launch

    launch = launches.launches(100, 54, 32, 16, "tf32")["forward"]
    assert compile_launch(launch, "fp32", 90, bias=False, norm=False).spilled == 0


@pytest.mark.parametrize("size", [1, 8, 16, 27, 54, 64, 144, 147, 294, 576, 2048])
def test_blocks_cover_every_size_with_little_padding(size):
    block = launches._block(size, 64)
    assert block in (16, 32, 64)
    assert -size % block < max(16, size / 8)


def test_precision_follows_torch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "tf32x3"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert launches.dot_precision(torch.float32) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_self_check_gives_the_reason_where_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.models.dau.fused_kernels", raising=False)
    monkeypatch.delattr("pipeline.models.dau.fused_kernels", raising=False)

    def reference(rows, z, weight, bias):
        w = torch.einsum("odr,nr->nod", weight, z) + bias
        return (w * rows[:, None]).sum(2), w.square().sum(2)

    reason = fused.self_check(torch.device("cpu"), torch.float32, reference)
    assert reason is not None
    assert reason.startswith("ModuleNotFoundError")
    assert "triton" in reason
