"""The Triton kernels, executed on a CPU, against the formulas with w formed as they read.

test_fused runs this file with TRITON_INTERPRET=1. The interpreter multiplies the bit patterns of
bf16 operands, so bf16 is not run here, but compiled, and self-checked on a GPU.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.models.dau import fused, kernels, launches

# So that a sum over few positions is split, too.
launches.MIN_SPAN = 50


def slow(rows, z, weight, bias):
    """Compute dot and norm2 (N, O) from w (N, O, D) held for all positions and units."""
    w = torch.einsum("odr,nr->nod", weight, z)
    if bias is not None:
        w = w + bias
    return (w * rows[:, None]).sum(2), w.square().sum(2)


def draw(positions, values, rank, units, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (positions, values),
        (positions, rank),
        (units, values, rank),
        (units, values),
        (positions, units),
        (positions, units),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*tensors[:3], tensors[3] if bias else None], tensors[4:]


def assert_close(ours, theirs):
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@settings(max_examples=6, deadline=None)
@given(
    positions=st.sampled_from([1, 7, 64, 70]),
    values=st.sampled_from([1, 9, 40]),
    rank=st.sampled_from([1, 5, 16, 35]),
    units=st.sampled_from([1, 3, 17]),
    bias=st.booleans(),
    norm=st.booleans(),
    # It changes the blocks.
    tf32=st.booleans(),
    seed=st.integers(0, 100),
)
@example(positions=131, values=21, rank=18, units=3, bias=True, norm=True, tf32=True, seed=0)
def test_equals_the_formulas(positions, values, rank, units, bias, norm, tf32, seed):
    operands, (grad_dot, grad_norm2) = draw(positions, values, rank, units, bias, seed)
    exact = [None if operand is None else operand.double().requires_grad_() for operand in operands]
    expected = slow(*exact)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    dot, norm2 = fused.forward(*operands, with_norm=norm)
    assert_close(dot, expected[0])
    assert (norm2 is not None) == norm
    if norm:
        assert_close(norm2, expected[1])
    loss = (expected[0] * grad_dot).sum() + (expected[1] * grad_norm2).sum() * norm
    wanted = torch.autograd.grad(
        loss, [tensor for tensor in exact if tensor is not None], retain_graph=True
    )
    # The rows do not enter norm2.
    if norm:
        torch.testing.assert_close(
            wanted[0],
            torch.autograd.grad((expected[0] * grad_dot).sum(), exact[0], retain_graph=True)[0],
        )
    gradients = fused.backward(
        *operands, grad_dot, grad_norm2 if norm else None, (True, True, True, bias)
    )
    assert (gradients[3] is None) == (not bias)
    for ours, theirs in zip(gradients, wanted, strict=False):
        assert_close(ours, theirs)
    explanation = fused.backward(*operands, grad_dot, grad_norm2, (True, False, False, False))
    assert explanation[1:] == (None, None, None)
    assert_close(explanation[0], wanted[0])


def test_norm_keeps_its_accuracy_in_a_weak_direction():
    (rows, _, weight, _), _ = draw(40, 30, 6, 3, bias=False)
    left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    singular[:, -1] = 1e-3 * singular[:, 0]
    weight = ((left * singular[:, None]) @ right).float()
    # A direction that is weak for unit 0.
    z = right[0, -1].float().expand(40, -1).contiguous()
    exact = slow(rows.double(), z.double(), weight.double(), None)[1][:, 0]
    norm2 = fused.forward(rows, z, weight, None, with_norm=True)[1][:, 0]
    gram = torch.einsum("nr,rs,ns->n", z, weight[0].T @ weight[0], z)
    torch.testing.assert_close(norm2.double(), exact, rtol=1e-3, atol=0)
    # The test can tell.
    assert (gram - exact).abs().max() > 1e-3 * exact.max()

    # Its gradient in z, 2 A^T A z, may use the Gram matrix: that errs a few times as much as A z in
    # fp32 does, not 1 / ratio times.
    cotangent = torch.tensor([[1.0, 0.0, 0.0]]).expand(40, -1)
    ours = fused.backward(
        rows, z, weight, None, torch.zeros(40, 3), cotangent, (False, True, False, False)
    )[1]
    in_two_steps = 2 * (z @ weight[0].T) @ weight[0]
    wanted = 2 * (z.double() @ weight[0].double().T) @ weight[0].double()
    assert (ours - wanted).norm() <= 10 * (in_two_steps - wanted).norm()


def test_same_inputs_give_the_same_bits():
    operands, cotangents = draw(131, 9, 5, 2, bias=True)
    first, second = (fused.backward(*operands, *cotangents, (True,) * 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_positions():
    operands, cotangents = draw(0, 9, 5, 2, bias=True)
    assert fused.forward(*operands, with_norm=True)[0].shape == (0, 2)
    assert not fused.backward(*operands, *cotangents, (True,) * 4)[2].any()


def test_self_check_passes_against_the_chunked_path():
    assert fused.self_check(torch.device("cpu"), torch.float32, kernels.reference) is None


def test_explanation_of_several_targets():
    (_, z, weight, bias), _ = draw(70, 21, 5, 3, bias=True)
    grads = torch.rand(2, 70, 3)
    wanted = torch.einsum("kno,nod->knd", grads, torch.einsum("odr,nr->nod", weight, z) + bias)
    assert_close(fused.explain(z, weight, bias, grads), wanted)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1, None), (1.1, "dot differs from plain PyTorch in torch.float32")]
)
def test_self_check_tells_right_from_wrong(factor, expected):
    def reference(*operands):
        dot, norm2 = slow(*operands)
        return dot * factor, norm2

    assert fused.self_check(torch.device("cpu"), torch.float32, reference) == expected
