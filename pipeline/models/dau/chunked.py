"""Dynamic Alignment Units in plain PyTorch, through chunks of positions (arXiv 2109.13004, eq.
1-4).

For a patch x of d values, its projection z = B x of r values, and unit o,

    w_o = A_o z + b_o,    dot_o = <w_o, x>,    norm2_o = <w_o, w_o>.

All w_o of all positions together are N x d x O numbers, hundreds of times the input. Two exact
formulations avoid them:

* by unit:  w_o of a chunk, one unit at a time, n x d numbers.
* by rank:  dot_o = <A_o^T x, z> + <b_o, x> and norm2_o = |R_o [z, 1]|^2 with [A_o, b_o] = Q_o R_o;
  the products of a chunk are n x r x O numbers. R_o keeps the accuracy that the Gram matrix G_o =
  [A_o, b_o]^T [A_o, b_o] would lose when z lies in a weak direction of A_o. The gradients go
  through G_o, which errs little there: it is only multiplied once.

With P = 2 N d r O and Q = 2 N r^2 O operations a training step takes 4 P by unit and 4 P + 3 Q by
rank, nearly all of it in matrix products, and besides 7 passes over N d O numbers by unit, over N r
O by rank. By rank is for low ranks.

Legend: N positions, n positions of a chunk, d values of a patch, r rank, O units, K targets, a =
    dL/d dot, c = 2 dL/d norm2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# of one temporary of a chunk; 4 MiB in fp32 stays in a CPU's last-level cache
CHUNK_NUMBERS = 2**20
# large products keep a GPU busy; not measured
CHUNK_NUMBERS_CUDA = 2**26
# of a pass over a temporary, in multiply-adds of a matrix product per number; measured on a CPU
PASS_COST = 8
# of the QR factorisation, in the same per number and column; it is far from the speed of a product
FACTOR_COST = 40

Needs = tuple[bool, bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Dot products and squared weight norms of every unit at every position.

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
    run = _forward_by_rank if _prefer_rank(weight, rows, with_norm) else _forward_by_unit
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
    """Gradients of :func:`forward`, each None unless ``needs`` asks for it.

    Args:
        rows, z, weight, bias: the arguments of :func:`forward`.
        grad_dot: dL/d dot, (N, O).
        grad_norm2: dL/d norm2, (N, O), or None.
        needs: whether the gradients of rows, z, weight and bias are wanted. The first alone is
            explanation mode.
    """
    if not any(needs[1:]):
        return (explain(z, weight, bias, grad_dot[None])[0] if needs[0] else None), None, None, None
    run = (
        _backward_by_rank
        if _prefer_rank(weight, rows, grad_norm2 is not None)
        else _backward_by_unit
    )
    return run(rows, z, weight, bias, grad_dot, grad_norm2, needs)


def explain(z: Tensor, weight: Tensor, bias: Tensor | None, grad_dot: Tensor) -> Tensor:
    """sum_o a_o w_o for several targets at once, the whole backward pass in explanation mode: (K,
    N, O) -> (K, N, d).

    By rank every target costs a matrix product. By unit w is formed once and a target costs one
    pass over it.
    """
    targets, units, rank = len(grad_dot), len(weight), weight.shape[2]
    out = grad_dot.new_zeros(targets, len(z), weight.shape[1])
    if targets * rank <= rank + targets * PASS_COST or z.dtype == torch.bfloat16:
        flat_t = _flat(weight).t()
        for part, outer in _chunks(z, rank * units):
            for k in range(targets):
                torch.mul(
                    z[part, :, None], grad_dot[k, part, None], out=outer.view(-1, rank, units)
                )
                _add_product(out[k, part], outer, flat_t)
                if bias is not None:
                    _add_product(out[k, part], grad_dot[k, part].to(bias.dtype), bias)
        return out
    for part, w in _chunks(z, weight.shape[1]):
        for unit in range(units):
            _weights(z[part], weight, bias, unit, w)
            for k in range(targets):
                out[k, part].addcmul_(w, grad_dot[k, part, unit, None])
    return out


def _prefer_rank(weight: Tensor, rows: Tensor, with_norm: bool) -> bool:
    """Whether by rank costs less; both are counted in multiply-adds per position and unit, beyond
    the 4 P that they share.

    bf16 always goes by rank, whose norm is computed apart, in fp32.
    """
    _, values, rank = weight.shape
    of_norm = (
        3 * (rank + 1) ** 2 + FACTOR_COST * values * (rank + 1) ** 2 / max(1, len(rows))
        if with_norm
        else 0
    )
    return 7 * PASS_COST * rank + of_norm < 7 * PASS_COST * values or rows.dtype == torch.bfloat16


def _chunks(z: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of positions, each with one and the same buffer of ``width`` numbers per position, in
    the dtype of ``z``.
    """
    budget = CHUNK_NUMBERS_CUDA if z.is_cuda else CHUNK_NUMBERS
    step = min(max(64, budget // width), len(z))
    buffer = z.new_empty(step, width)
    for start in range(0, len(z), max(1, step)):
        stop = min(start + step, len(z))
        yield slice(start, stop), buffer[: stop - start]


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, where ``out`` may be of higher precision than the operands."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _flat(weight: Tensor) -> Tensor:
    """(O, i, j) -> (i, j * O): one matrix product serves all units, and sums over j run along
    contiguous units.
    """
    return weight.permute(1, 2, 0).reshape(weight.shape[1], -1)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[A_o, b_o] (O, d, r + 1) in at least fp32, or A_o alone."""
    full = weight if bias is None else torch.cat([weight, bias[:, :, None]], 2)
    return full.to(_accumulator(weight.dtype))


def _homogeneous(z: Tensor, bias: Tensor | None) -> Tensor:
    """[z, 1] in at least fp32, so that the bias is one more column of A; z alone without bias."""
    z = z.to(_accumulator(z.dtype))
    return z if bias is None else torch.cat([z, z.new_ones(len(z), 1)], 1)


def _forward_by_rank(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    units, rank = len(weight), weight.shape[2]
    exact = _accumulator(rows.dtype)
    dot = (
        rows.new_zeros(len(rows), units, dtype=exact)
        if bias is None
        else (rows @ bias.t()).to(exact)
    )
    flat = _flat(weight)
    for part, products in _chunks(rows, flat.shape[1]):
        # A_o^T x
        torch.mm(rows[part], flat, out=products)
        dot[part] += products.view(-1, rank, units).mul_(z[part, :, None]).sum(1, dtype=exact)
    if not with_norm:
        return dot, None
    norm2 = torch.empty_like(dot)
    z1 = _homogeneous(z, bias)
    # (O, min(d, r'), r')
    triangular = torch.linalg.qr(_with_bias(weight, bias), mode="r").R
    factor = _flat(triangular.transpose(1, 2))
    for part, images in _chunks(z1, factor.shape[1]):
        # R_o [z, 1]
        torch.mm(z1[part], factor, out=images)
        torch.sum(images.square_().view(len(images), -1, units), 1, out=norm2[part])
    return dot, norm2


def _backward_by_rank(
    rows: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dot: Tensor,
    grad_norm2: Tensor | None,
    needs: Needs,
) -> Gradients:
    needs_rows, needs_z, needs_weight, needs_bias = needs
    units, values, rank = weight.shape
    exact = _accumulator(rows.dtype)
    flat = _flat(weight)
    scale = grad_dot.to(rows.dtype)
    grad_rows = rows.new_zeros(rows.shape, dtype=exact) if needs_rows else None
    grad_z = z.new_zeros(z.shape, dtype=exact) if needs_z else None
    grad_flat = flat.new_zeros(flat.shape, dtype=exact) if needs_weight else None
    grad_bias = (scale.t() @ rows).to(exact) if needs_bias else None
    if grad_rows is not None and bias is not None:
        _add_product(grad_rows, scale, bias)
    for part, products in _chunks(rows, flat.shape[1]):
        cube = products.view(-1, rank, units)
        if grad_z is not None:
            torch.mm(rows[part], flat, out=products)
            grad_z[part] += cube.mul_(scale[part, None, :]).sum(2, dtype=exact)
        torch.mul(z[part, :, None], scale[part, None, :], out=cube)
        if grad_rows is not None:
            _add_product(grad_rows[part], products, flat.t())
        if grad_flat is not None:
            _add_product(grad_flat, rows[part].t(), products)
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
    """Add sum_o c_o G_o [z, 1] to dL/dz, and [A_o, b_o] sum_n c_o [z, 1] [z, 1]^T to dL/d[A_o,
    b_o], unless they are None.
    """
    units, rank = len(weight), weight.shape[2]
    z1, full = _homogeneous(z, bias), _with_bias(weight, bias)
    # (r' * O, r)
    gram = (full.transpose(1, 2) @ full)[:, :, :rank].permute(1, 0, 2).reshape(-1, rank)
    moments = z1.new_zeros(z1.shape[1], len(gram))
    for part, outer in _chunks(z1, len(gram)):
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


def _forward_by_unit(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    dot = rows.new_empty(len(weight), len(rows))
    norm2 = torch.empty_like(dot) if with_norm else None
    for part, w in _chunks(rows, rows.shape[1]):
        for unit in range(len(weight)):
            _weights(z[part], weight, bias, unit, w)
            if norm2 is not None:
                torch.linalg.vector_norm(w, dim=1, out=norm2[unit, part])
            torch.sum(w.mul_(rows[part]), 1, out=dot[unit, part])
    return dot.t(), None if norm2 is None else norm2.square_().t()


def _backward_by_unit(
    rows: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dot: Tensor,
    grad_norm2: Tensor | None,
    needs: Needs,
) -> Gradients:
    needs_rows, needs_z, needs_weight, needs_bias = needs
    grad_rows = torch.zeros_like(rows) if needs_rows else None
    grad_z = torch.zeros_like(z) if needs_z else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    for part, w in _chunks(rows, rows.shape[1]):
        for unit in range(len(weight)):
            a = grad_dot[part, unit, None]
            _weights(z[part], weight, bias, unit, w)
            if grad_rows is not None:
                grad_rows[part].addcmul_(w, a)
            if grad_norm2 is None:
                torch.mul(rows[part], a, out=w)
            else:
                w.mul_(2 * grad_norm2[part, unit, None]).addcmul_(rows[part], a)
            if grad_z is not None:
                grad_z[part].addmm_(w, weight[unit])
            if grad_weight is not None and part.start == 0:
                # not added to zeros: A has more numbers than a chunk where r is high
                torch.mm(w.t(), z[part], out=grad_weight[unit])
            elif grad_weight is not None:
                grad_weight[unit].addmm_(w.t(), z[part])
    if not needs_bias:
        return grad_rows, grad_z, grad_weight, None
    assert bias is not None
    grad_bias = grad_dot.t() @ rows
    if grad_norm2 is not None:
        c = 2 * grad_norm2.t()  # (O, N)
        grad_bias.addcmul_(bias, c.sum(1, keepdim=True))
        for of_unit, a_o, moment in zip(grad_bias, weight, c @ z, strict=True):
            # bmm is several times slower at this
            of_unit.addmv_(a_o, moment)
    return grad_rows, grad_z, grad_weight, grad_bias


def _weights(z: Tensor, weight: Tensor, bias: Tensor | None, unit: int, out: Tensor) -> None:
    """w_o of one unit at the positions of ``z`` (n, r), into ``out`` (n, d)."""
    torch.mm(z, weight[unit].t(), out=out)
    if bias is not None:
        # cheaper than addmm, which fills ``out`` with the bias first and reads it again
        out += bias[unit]
