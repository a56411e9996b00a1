"""Dynamic Alignment Units in plain PyTorch, through chunks of positions.

Source of the formulas: arXiv 2109.13004, eq. 1-4. For a patch x of d values, its projection z = B x
of r values, and unit o,

    w_o = A_o z + b_o,    dot_o = <w_o, x>,    norm2_o = <w_o, w_o>.

All w_o of all positions together are N x d x O numbers, hundreds of times the input. Two exact
formulations avoid them:

* by unit: w_o of a chunk, one unit at a time, n x d numbers (``chunked_by_unit``);
* by rank: products A_o^T x of a chunk, n x r x O numbers (``chunked_by_rank``).

With P = 2 N d r O and Q = 2 N r^2 O operations a training step takes 4 P by unit and 4 P + 3 Q by
rank, nearly all of it in matrix products. Besides, it passes 7 times over N d O numbers by unit,
over N r O by rank. By rank is for low ranks.

Legend: N positions, n positions of a chunk, d values of a patch, r rank, O units, K targets,
a = dL/d dot, c = 2 dL/d norm2.
"""

import torch
from torch import Tensor

from pipeline.models.dau import chunked_by_rank, chunked_by_unit
from pipeline.models.dau.chunks import Gradients, Needs, add_product, chunks, flatten_units

# Cost of a pass over a temporary, in multiply-adds of a matrix product per number; measured on a
# CPU.
PASS_COST = 8
# Cost of the QR factorisation, in the same per number and column; it is far from the speed of a
# product.
FACTOR_COST = 40


def forward(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the dot products and squared weight norms of every unit at every position.

    Args:
        rows: patches x, (N, d); fp32, fp64 or bf16, as the other operands.
        z: projections, (N, r).
        weight: A, (O, d, r).
        bias: b, (O, d), or None.
        with_norm: whether norm2 is wanted; it costs more than the dot product where r is close to
            d.

    Returns:
        dot (N, O) and norm2 (N, O) or None, accumulated in fp32 for bf16 operands.
    """
    by_rank = _prefer_rank(weight, rows, with_norm)
    run = chunked_by_rank.forward if by_rank else chunked_by_unit.forward
    return run(rows, z, weight, bias, with_norm)


def backward(
    rows: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dot: Tensor,
    grad_norm2: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Compute the gradients of :func:`forward`, as ``kernels.Kernels.backward`` says.

    The gradient of rows alone is that of explanation mode.
    """
    if not any(needs[1:]):
        explanation = explain(z, weight, bias, grad_dot[None])[0] if needs[0] else None
        return explanation, None, None, None
    by_rank = _prefer_rank(weight, rows, grad_norm2 is not None)
    run = chunked_by_rank.backward if by_rank else chunked_by_unit.backward
    return run(rows, z, weight, bias, grad_dot, grad_norm2, needs)


def explain(z: Tensor, weight: Tensor, bias: Tensor | None, grad_dot: Tensor) -> Tensor:
    """Compute sum_o a_o w_o for several targets at once: (K, N, O) -> (K, N, d).

    This is the whole backward pass in explanation mode. By rank every target costs a matrix
    product. By unit w is formed once, and a target costs one pass over it.
    """
    targets, units, rank = len(grad_dot), len(weight), weight.shape[2]
    out = grad_dot.new_zeros(targets, len(z), weight.shape[1])
    if targets * rank <= rank + targets * PASS_COST or z.dtype == torch.bfloat16:
        flat_t = flatten_units(weight).t()
        for part, outer in chunks(z, rank * units):
            for k in range(targets):
                torch.mul(
                    z[part, :, None], grad_dot[k, part, None], out=outer.view(-1, rank, units)
                )
                add_product(out[k, part], outer, flat_t)
                if bias is not None:
                    add_product(out[k, part], grad_dot[k, part].to(bias.dtype), bias)
        return out
    for part, w in chunks(z, weight.shape[1]):
        for unit in range(units):
            chunked_by_unit.form_weights(z[part], weight, bias, unit, w)
            for k in range(targets):
                out[k, part].addcmul_(w, grad_dot[k, part, unit, None])
    return out


def _prefer_rank(weight: Tensor, rows: Tensor, with_norm: bool) -> bool:
    """Whether by rank costs less, in multiply-adds per position and unit beyond the common 4 P.

    bf16 always goes by rank, whose norm is computed apart, in fp32.
    """
    if rows.dtype == torch.bfloat16:
        return True
    _, values, rank = weight.shape
    of_norm = 0.0
    if with_norm:
        factorisation = FACTOR_COST * values * (rank + 1) ** 2 / max(1, len(rows))
        of_norm = 3 * (rank + 1) ** 2 + factorisation
    return 7 * PASS_COST * rank + of_norm < 7 * PASS_COST * values
