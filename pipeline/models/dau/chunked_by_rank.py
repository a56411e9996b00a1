"""Dynamic Alignment Units by rank: no dynamic weight is formed (arXiv 2109.13004, eq. 1-4).

dot_o = <A_o^T x, z> + <b_o, x> and norm2_o = |R_o [z, 1]|^2 with [A_o, b_o] = Q_o R_o. R_o keeps
the accuracy that the Gram matrix G_o = [A_o, b_o]^T [A_o, b_o] would lose when z lies in a weak
direction of A_o. The gradients go through G_o, which errs little there: it is multiplied only once.

The functions are those of ``chunked``, whose legend holds here; r' is r + 1 with bias, else r.
"""

import torch
from torch import Tensor

from pipeline.models.dau.chunks import (
    Gradients,
    Needs,
    accumulator,
    add_product,
    chunks,
    flatten_units,
)


def forward(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute dot and norm2; see :func:`chunked.forward`."""
    units, rank = len(weight), weight.shape[2]
    exact = accumulator(rows.dtype)
    dot = (
        rows.new_zeros(len(rows), units, dtype=exact)
        if bias is None
        else (rows @ bias.t()).to(exact)
    )
    flat = flatten_units(weight)
    for part, products in chunks(rows, flat.shape[1]):
        # Products A_o^T x, (n, r * O).
        torch.mm(rows[part], flat, out=products)
        dot[part] += products.view(-1, rank, units).mul_(z[part, :, None]).sum(1, dtype=exact)
    if not with_norm:
        return dot, None
    norm2 = torch.empty_like(dot)
    z1 = _homogeneous(z, bias)
    triangular = torch.linalg.qr(_with_bias(weight, bias), mode="r").R  # (O, min(d, r'), r')
    factor = flatten_units(triangular.transpose(1, 2))
    for part, images in chunks(z1, factor.shape[1]):
        # Images R_o [z, 1].
        torch.mm(z1[part], factor, out=images)
        torch.sum(images.square_().view(len(images), -1, units), 1, out=norm2[part])
    return dot, norm2


def backward(
    rows: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dot: Tensor,
    grad_norm2: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Compute the gradients; see :func:`chunked.backward`."""
    needs_rows, needs_z, needs_weight, needs_bias = needs
    units, values, rank = weight.shape
    exact = accumulator(rows.dtype)
    flat = flatten_units(weight)
    scale = grad_dot.to(rows.dtype)
    grad_rows = rows.new_zeros(rows.shape, dtype=exact) if needs_rows else None
    grad_z = z.new_zeros(z.shape, dtype=exact) if needs_z else None
    grad_flat = flat.new_zeros(flat.shape, dtype=exact) if needs_weight else None
    grad_bias = (scale.t() @ rows).to(exact) if needs_bias else None
    if grad_rows is not None and bias is not None:
        add_product(grad_rows, scale, bias)
    for part, products in chunks(rows, flat.shape[1]):
        cube = products.view(-1, rank, units)
        if grad_z is not None:
            torch.mm(rows[part], flat, out=products)
            grad_z[part] += cube.mul_(scale[part, None, :]).sum(2, dtype=exact)
        torch.mul(z[part, :, None], scale[part, None, :], out=cube)
        if grad_rows is not None:
            add_product(grad_rows[part], products, flat.t())
        if grad_flat is not None:
            add_product(grad_flat, rows[part].t(), products)
    grad_weight = (
        None
        if grad_flat is None
        else grad_flat.view(values, rank, units).permute(2, 0, 1).contiguous()
    )
    if grad_norm2 is not None:
        _add_gradients_of_norm2(z, weight, bias, grad_norm2, grad_z, grad_weight, grad_bias)
    return grad_rows, grad_z, grad_weight, grad_bias


def _add_gradients_of_norm2(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_norm2: Tensor,
    grad_z: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Add the gradients of norm2 to those that are not None.

    They are sum_o c_o G_o [z, 1] of z and [A_o, b_o] sum_n c_o [z, 1] [z, 1]^T of [A_o, b_o].
    """
    units, rank = len(weight), weight.shape[2]
    z1, full = _homogeneous(z, bias), _with_bias(weight, bias)
    gram = (full.transpose(1, 2) @ full)[:, :, :rank]  # (O, r', r)
    gram = gram.permute(1, 0, 2).reshape(-1, rank)  # (r' * O, r)
    moments = z1.new_zeros(z1.shape[1], len(gram))
    for part, outer in chunks(z1, len(gram)):
        torch.mul(
            z1[part, :, None], 2 * grad_norm2[part, None, :], out=outer.view(-1, z1.shape[1], units)
        )
        if grad_z is not None:
            grad_z[part].addmm_(outer, gram)
        if grad_weight is not None or grad_bias is not None:
            moments.addmm_(z1[part].t(), outer)
    if grad_weight is None and grad_bias is None:
        return
    of_full = full @ moments.view(len(moments), -1, units).permute(2, 0, 1)  # (O, d, r')
    if grad_weight is not None:
        grad_weight += of_full[:, :, :rank]
    if grad_bias is not None:
        grad_bias += of_full[:, :, rank]


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Join [A_o, b_o] (O, d, r') in at least fp32; without bias, A_o alone."""
    full = weight if bias is None else torch.cat([weight, bias[:, :, None]], 2)
    return full.to(accumulator(weight.dtype))


def _homogeneous(z: Tensor, bias: Tensor | None) -> Tensor:
    """Extend z to [z, 1] (N, r') in at least fp32, as the bias is one more column of A."""
    z = z.to(accumulator(z.dtype))
    return z if bias is None else torch.cat([z, z.new_ones(len(z), 1)], 1)
