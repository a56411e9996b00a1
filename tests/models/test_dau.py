"""DAUConv2d against its slow twin, at the edges, and in explanation mode."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.dau import DAUConv2d, chunks, functional
from pipeline.models.dau.functional import Geometry
from pipeline.models.dau.reference import twin


def make(
    norm,
    *,
    inputs=3,
    units=5,
    kernel=3,
    stride=1,
    padding=1,
    rank=2,
    bias=True,
    dtype=torch.float64,
    seed=0,
):
    torch.manual_seed(seed)
    return DAUConv2d(
        inputs, units, kernel, stride=stride, padding=padding, rank=rank, norm=norm, bias=bias
    ).to(dtype)


def outputs_and_gradients(function, layer, x):
    x = x.clone().requires_grad_()
    y = function(x)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()])]


def assert_close_relative(ours, theirs, tolerance):
    # A gradient that cancels to zero is all rounding.
    floor = 1e-3 * max(b.norm() for b in theirs)
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
def test_equals_the_twin(
    norm, kernel, stride, padding, size, rank, bias, batch, seed, small_chunks
):
    layer = make(
        norm, kernel=kernel, stride=stride, padding=padding, rank=rank, bias=bias, seed=seed
    )
    x = torch.rand(batch, 3, *size, dtype=torch.float64)
    whole = chunks.CHUNK_NUMBERS
    chunks.CHUNK_NUMBERS = 64 if small_chunks else whole
    try:
        ours = outputs_and_gradients(layer, layer, x)
        assert_close_relative(ours, outputs_and_gradients(lambda t: twin(layer, t), layer, x), 1e-8)
        if rank == 1 and norm != "sq":
            # w keeps its direction whatever z is, so the gradients in z are zero, and in fp32
            # nothing but rounding.
            return
        single = layer.float()
        ours = outputs_and_gradients(single, single, x.float())
        assert_close_relative(
            ours, outputs_and_gradients(lambda t: twin(single, t), single, x.float()), 2e-3
        )
    finally:
        chunks.CHUNK_NUMBERS = whole


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
# These ranks go by rank and by unit.
@pytest.mark.parametrize("rank", [2, 20])
def test_gradcheck(norm, rank):
    layer = make(norm, rank=rank, inputs=2, units=2)
    x = torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(
        call, (x, *[p.detach().requires_grad_() for p in layer.parameters()])
    )


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
def test_output_never_exceeds_the_norm_of_the_patch(norm):
    layer = make(norm, inputs=4, rank=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 100
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    patch_norm = functional.unfold(x, Geometry(3, 1, 1)).norm(dim=1).view(2, 1, 8, 8)
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
@pytest.mark.parametrize("rank", [2, 70])
def test_zero_input_or_zero_weights_give_zero(norm, rank):
    layer, x = make(norm, rank=rank), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    y, _, *of_parameters = outputs_and_gradients(layer, layer, torch.zeros_like(x))
    assert not y.any()
    assert not any(gradient.any() for gradient in of_parameters)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    y, of_x, *_ = outputs_and_gradients(layer, layer, x)
    assert not y.any()
    assert not of_x.any()


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


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
def test_saved_for_backward_is_input_projection_and_outputs(norm, rank):
    layer, x = (
        make(norm, rank=rank, inputs=8, units=6),
        torch.rand(2, 8, 10, 9, dtype=torch.float64, requires_grad=True),
    )
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = {}

    def keep(tensor):
        # It is held, so that no other tensor gets its place.
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    numbers = sum(
        tensor.untyped_storage().nbytes() // 8
        for pointer, tensor in saved.items()
        if pointer not in parameters
    )
    positions = y[:, 0].numel()
    assert numbers <= positions * (8 * 9 + rank + 8 * 6)
    assert numbers < positions * 8 * 9 * 6 / 2


def test_nothing_of_the_size_of_all_dynamic_weights_is_allocated():
    layer = make("sq", inputs=32, units=64, rank=8, dtype=torch.float32)
    x = torch.rand(8, 32, 32, 32, requires_grad=True)
    # N * d * O numbers, which are 604 MB.
    all_weights = 8 * 32 * 32 * 32 * 9 * 64
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    ) as profile:
        layer(x).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * all_weights / 20


# These ranks go by rank and by unit.
@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_many_targets_from_one_backward_pass(rank, bias):
    layer = make("sq", rank=rank, bias=bias)
    layer.explaining = True
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    cotangents = torch.rand(9, *y.shape, dtype=torch.float64)
    together = torch.func.vmap(
        lambda cotangent: torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]
    )(cotangents)
    for cotangent, gradient in zip(cotangents, together, strict=True):
        torch.testing.assert_close(
            gradient, torch.autograd.grad((twin(layer, x) * cotangent).sum(), x)[0]
        )


def trained(module, x):
    """Output and all gradients of a step."""
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


def chain():
    return nn.Sequential(
        make("sq", rank=20),
        make("l2", inputs=5, units=4, stride=2, seed=1),
        make("wb", inputs=4, units=3, seed=2),
    )


def test_activation_checkpointing_compilation_and_copies_change_nothing():
    module, x = chain(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = trained(module, x)
    copied = copy.deepcopy(module)
    loaded = chain()
    for parameter in loaded.parameters():
        parameter.data.zero_()
    loaded.load_state_dict(module.state_dict())
    # The graph breaks at dynamic_dot.
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager")
    recomputed = nn.Module()
    recomputed.inner = copy.deepcopy(module)
    recomputed.forward = lambda x: checkpoint(recomputed.inner, x, use_reentrant=False)
    for other in (module, copied, loaded, compiled, recomputed):
        for a, b in zip(trained(other, x), expected, strict=True):
            # Every step is deterministic, too.
            assert torch.equal(a, b)


def _gradients_on_two(rank, size, port, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = chain()
    parallel = nn.parallel.DistributedDataParallel(module)
    parallel(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    alone = chain()
    # DDP averages over the processes.
    (alone(x).square().sum() / 2).backward()
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    (folder / f"seen{rank}").touch()
    torch.distributed.destroy_process_group()


def test_data_parallel_gradients_are_those_of_the_whole_batch(tmp_path):
    run_on(2, _gradients_on_two, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("argument", "value"), [("norm", "l3"), ("rank", 0)])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(ValueError, match=argument):
        DAUConv2d(3, 4, 3, **{"rank": 2, argument: value})
