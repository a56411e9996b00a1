"""The chunked kernels: patches, the accuracy of both formulations, and how often w is formed."""

import pytest
import torch

from pipeline.models.dau import chunked, chunked_by_rank, chunked_by_unit, functional
from pipeline.models.dau.functional import Geometry


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 1), (3, 1, 1), (3, 2, 0), (7, 3, 3)]
)
def test_unfold_orders_row_column_channel_and_fold_is_its_adjoint(kernel, stride, padding):
    geometry = Geometry(kernel, stride, padding)
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    rows = functional.unfold(x, geometry)
    published = torch.nn.functional.unfold(x, kernel, stride=stride, padding=padding)
    published = published.unflatten(1, (3, -1))  # (B, C, k * k, L)
    assert torch.equal(rows, published.permute(0, 3, 2, 1).flatten(0, 1).flatten(1))
    other = torch.rand_like(rows)
    torch.testing.assert_close(
        (functional.fold(other, x.shape, geometry) * x).sum(), (other * rows).sum()
    )


def test_norm_keeps_its_accuracy_in_a_weak_direction():
    generator = torch.Generator().manual_seed(0)
    left, singular, right = torch.linalg.svd(
        torch.randn(1, 50, 6, generator=generator, dtype=torch.float64), full_matrices=False
    )
    singular[:, -1] = 1e-3 * singular[:, 0]
    weight = (left * singular[:, None]) @ right
    # A direction that A shortens a thousand times.
    z = right[:, -1].expand(40, -1)
    exact = (z @ weight[0].T).square().sum(1)
    single = weight.float(), z.float()
    _, norm2 = chunked_by_rank.forward(torch.rand(40, 50), single[1], single[0], None, True)
    torch.testing.assert_close(norm2[:, 0].double(), exact, rtol=1e-4, atol=0)
    gram = single[0][0].T @ single[0][0]
    by_gram = torch.einsum("nr,rs,ns->n", single[1], gram, single[1])
    # The test can tell.
    assert (by_gram.double() / exact - 1).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_both_formulations_agree_and_bf16_operands_come_near(bias):
    generator = torch.Generator().manual_seed(0)
    rows, z, weight, b, grad_dot, grad_norm2 = (
        torch.randn(shape, generator=generator)
        for shape in [(90, 36), (90, 5), (7, 36, 5), (7, 36), (90, 7), (90, 7)]
    )
    operands, cotangents = (rows, z, weight, b if bias else None), (grad_dot, grad_norm2)
    needs = (True, True, True, bias)
    by_rank = [
        *chunked_by_rank.forward(*operands, True),
        *chunked_by_rank.backward(*operands, *cotangents, needs),
    ]
    by_unit = [
        *chunked_by_unit.forward(*operands, True),
        *chunked_by_unit.backward(*operands, *cotangents, needs),
    ]
    short = [None if operand is None else operand.bfloat16() for operand in operands]
    in_bf16 = [*chunked.forward(*short, True), *chunked.backward(*short, *cotangents, needs)]
    for a, b, c in zip(by_rank, by_unit, in_bf16, strict=True):
        if b is not None:
            assert (a - b).norm() <= 1e-5 * b.norm()
            assert c.dtype == torch.float32
            assert (c - b).norm() <= 2e-2 * b.norm()


def test_dynamic_weights_are_formed_once_for_many_targets():
    formed = 0
    original = chunked_by_unit.form_weights

    def counting(*arguments):
        nonlocal formed
        formed += 1
        original(*arguments)

    z, weight = torch.rand(50, 40), torch.rand(6, 45, 40)
    chunked_by_unit.form_weights = counting
    try:
        chunked.explain(z, weight, None, torch.rand(9, 50, 6))
    finally:
        chunked_by_unit.form_weights = original
    assert formed == 6
