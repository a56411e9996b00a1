"""Dynamic Alignment Units by unit: the dynamic weights of a chunk, one unit at a time.

Source of the formulas: arXiv 2109.13004, eq. 1-4. The functions are those of ``chunked``, whose
legend holds here.
"""

import torch
from torch import Tensor

from pipeline.models.dau.chunks import Gradients, Needs, chunks


def forward(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute dot and norm2; see :func:`chunked.forward`."""
    dot = rows.new_empty(len(weight), len(rows))
    norm2 = torch.empty_like(dot) if with_norm else None
    for part, w in chunks(rows, rows.shape[1]):
        for unit in range(len(weight)):
            form_weights(z[part], weight, bias, unit, w)
            if norm2 is not None:
                torch.linalg.vector_norm(w, dim=1, out=norm2[unit, part])
            torch.sum(w.mul_(rows[part]), 1, out=dot[unit, part])
    return dot.t(), None if norm2 is None else norm2.square_().t()


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
    grad_rows = torch.zeros_like(rows) if needs_rows else None
    grad_z = torch.zeros_like(z) if needs_z else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    for part, w in chunks(rows, rows.shape[1]):
        for unit in range(len(weight)):
            a = grad_dot[part, unit, None]
            form_weights(z[part], weight, bias, unit, w)
            if grad_rows is not None:
                grad_rows[part].addcmul_(w, a)
            if grad_norm2 is None:
                torch.mul(rows[part], a, out=w)
            else:
                w.mul_(2 * grad_norm2[part, unit, None]).addcmul_(rows[part], a)
            if grad_z is not None:
                grad_z[part].addmm_(w, weight[unit])
            if grad_weight is not None and part.start == 0:
                # Not added to zeros: where r is high, A has more numbers than a chunk.
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
            # bmm is several times slower at this.
            of_unit.addmv_(a_o, moment)
    return grad_rows, grad_z, grad_weight, grad_bias


def form_weights(z: Tensor, weight: Tensor, bias: Tensor | None, unit: int, out: Tensor) -> None:
    """Form w_o of one unit at the positions of ``z`` (n, r) in ``out`` (n, d)."""
    torch.mm(z, weight[unit].t(), out=out)
    if bias is not None:
        # Cheaper than addmm, which fills ``out`` with the bias first and reads it again.
        out += bias[unit]
