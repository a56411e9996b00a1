"""The choice of a layer's kernels, and its replacement for the length of a block."""

import logging
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pipeline.models.dau import DAUConv2d, chunked, kernels
from pipeline.models.dau.kernels import kernels_for, use_kernels
from pipeline.planning.dry_run import _FusedKernels, _Recorder


class Counting:
    """The chunked kernels, which count the passes they serve."""

    def __init__(self):
        self.passes = []

    def forward(self, *arguments):
        self.passes.append("forward")
        return chunked.forward(*arguments)

    def backward(self, *arguments):
        self.passes.append("backward")
        return chunked.backward(*arguments)

    def explain(self, *arguments):
        self.passes.append("explain")
        return chunked.explain(*arguments)


def a_layer():
    torch.manual_seed(0)
    return DAUConv2d(3, 4, 3, rank=2), torch.rand(1, 3, 5, 5, requires_grad=True)


def test_a_block_replaces_the_kernels_of_every_pass():
    layer, x = a_layer()
    expected = layer(x)
    counting = Counting()
    with use_kernels(counting):
        y = layer(x)
        y.sum().backward()
        layer.explaining = True
        layer(x).sum().backward()
    assert torch.equal(y, expected)
    assert counting.passes == ["forward", "backward", "forward", "explain"]
    assert kernels_for(layer.up_weight) is chunked


def test_blocks_are_nested_and_an_error_ends_them():
    weight, outer, inner = a_layer()[0].up_weight, Counting(), Counting()

    def fail():
        with use_kernels(inner):
            assert kernels_for(weight) is inner
            raise RuntimeError("planted")

    with use_kernels(outer):
        with pytest.raises(RuntimeError, match="planted"):
            fail()
        assert kernels_for(weight) is outer
    assert kernels_for(weight) is chunked


def test_a_block_reaches_a_backward_pass_in_another_thread():
    """As autograd's passes on a GPU are: a thread starts with an empty context."""
    layer, x = a_layer()
    counting = Counting()
    with use_kernels(counting):
        loss = layer(x).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert counting.passes == ["forward", "backward"]


def test_the_kernels_of_the_dry_run_have_the_shapes_of_the_real_ones():
    rows, z, weight, bias = (
        torch.rand(shape, device="meta") for shape in [(50, 27), (50, 2), (4, 27, 2), (4, 27)]
    )
    grads = torch.rand(3, 50, 4, device="meta")
    needs = (True, True, True, True)
    recorder = _Recorder()
    found, expected = (
        [
            *used.forward(rows, z, weight, bias, True),
            *used.backward(rows, z, weight, bias, grads[0], grads[1], needs),
            used.explain(z, weight, bias, grads),
        ]
        for used in (_FusedKernels(recorder), chunked)
    )
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in expected]
    assert [operation.backward for operation in recorder.operations] == [False, *[True] * 4]
    # A target of an explanation is one matrix product with A_o and b_o for each position and unit.
    assert recorder.operations[-1].multiply_adds == 50 * 4 * (27 * 3 + 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, the fused kernels may be used")
def test_cuda_without_fused_kernels_takes_the_chunked_ones_and_logs_why_once(caplog):
    kernels._fused_agree.cache_clear()
    with FakeTensorMode():
        weights = [
            torch.empty(4, 27, 2, device="cuda", dtype=dtype)
            for dtype in (torch.float32, torch.float32, torch.bfloat16)
        ]
    with caplog.at_level(logging.WARNING):
        for weight in weights:
            assert kernels_for(weight) is chunked
    # Once for each data type.
    assert len(caplog.records) == 2
    assert "fused DAU kernels are not used on cuda" in caplog.text
