"""DAUConv2d against its slow twin, at the edges, and in explanation mode."""

import pytest
import torch
from dau_twin import twin
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import dau_functional
from pipeline.models.dau import DAUConv2d


def make(norm, *, inputs=3, units=5, kernel=3, stride=1, padding=1, rank=2, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return DAUConv2d(inputs, units, kernel, stride=stride, padding=padding, rank=rank, norm=norm, bias=bias).to(dtype)


def outputs_and_gradients(function, layer, x):
    x = x.clone().requires_grad_()
    y = function(x)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()])]


def assert_close_relative(ours, theirs, tolerance):
    floor = 1e-3 * max(b.norm() for b in theirs)  # a gradient that cancels to zero is all rounding
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(floor)


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(["sq", "l2", "wb"]),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    rank=st.sampled_from([1, 2, 5, 70]),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 100),
    small_chunks=st.booleans(),
)
def test_equals_the_twin(norm, kernel, stride, padding, size, rank, bias, batch, seed, small_chunks):
    layer = make(norm, kernel=kernel, stride=stride, padding=padding, rank=rank, bias=bias, seed=seed)
    x = torch.rand(batch, 3, *size, dtype=torch.float64)
    whole = dau_functional.CHUNK_NUMBERS
    dau_functional.CHUNK_NUMBERS = 64 if small_chunks else whole
    try:
        ours = outputs_and_gradients(layer, layer, x)
        assert_close_relative(ours, outputs_and_gradients(lambda t: twin(layer, t), layer, x), 1e-8)
        if rank == 1 and norm != "sq":
            return  # w keeps its direction whatever z is: the gradients in z are zero, and in fp32 all rounding
        single = layer.float()
        ours = outputs_and_gradients(single, single, x.float())
        assert_close_relative(ours, outputs_and_gradients(lambda t: twin(single, t), single, x.float()), 2e-3)
    finally:
        dau_functional.CHUNK_NUMBERS = whole


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
@pytest.mark.parametrize("rank", [2, 20])  # by rank and by unit
def test_gradcheck(norm, rank):
    layer = make(norm, rank=rank, inputs=2, units=2)
    x = torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *[p.detach().requires_grad_() for p in layer.parameters()]))


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
def test_output_never_exceeds_the_norm_of_the_patch(norm):
    layer = make(norm, inputs=4, rank=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 100
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    patch_norm = dau_functional.unfold(x, 3, 1, 1).norm(dim=1).view(2, 1, 8, 8)
    assert (layer(x).abs() <= patch_norm * (1 + 1e-12)).all()


def test_weight_bound_is_homogeneous_and_has_no_bias():
    layer = make("wb", bias=True)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    assert layer.up_bias is None
    torch.testing.assert_close(layer(3 * x), 3 * layer(x))


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
@pytest.mark.parametrize("rank", [2, 70])
@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e12])
@pytest.mark.parametrize("what", ["input", "weights"])
def test_edges_are_finite(norm, rank, scale, what):
    layer = make(norm, rank=rank, dtype=torch.float32)
    x = torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        if what == "input":
            x *= scale
        else:
            for parameter in layer.parameters():
                parameter *= scale if scale < 1 else 1e6
    for tensor in outputs_and_gradients(layer, layer, x):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
@pytest.mark.parametrize("rank", [2, 20])
def test_explanation_mode_is_the_linear_map_of_the_dynamic_weights(norm, rank):
    layer = make(norm, rank=rank)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    usual = layer(x)
    layer.explaining = True
    y = layer(x)
    torch.testing.assert_close(y, usual)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((gradient * x).sum(), y.sum())
    (slow,) = torch.autograd.grad(twin(layer, x).sum(), x)
    torch.testing.assert_close(gradient, slow)


def test_bf16_autocast_computes_in_the_precision_of_the_parameters():
    layer = make("sq", dtype=torch.float32)
    x = torch.rand(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
        assert layer(x.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(layer(x.bfloat16()), layer(x), rtol=2e-2, atol=2e-2)


def test_nothing_of_the_size_of_all_dynamic_weights_is_allocated():
    layer = make("sq", inputs=32, units=64, rank=8, dtype=torch.float32)
    x = torch.rand(8, 32, 32, 32, requires_grad=True)
    all_weights = 8 * 32 * 32 * 32 * 9 * 64  # N * d * O numbers: 604 MB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profile:
        layer(x).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * all_weights / 20


@pytest.mark.parametrize(("argument", "value"), [("norm", "l3"), ("rank", 0)])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(ValueError, match=argument):
        DAUConv2d(3, 4, 3, **{"rank": 2, argument: value})
