"""Dot product and weight norm of Dynamic Alignment Units without the dynamic weights (arXiv 2109.13004, eq. 1-4).

For a patch x of d values, its projection z = B x of r values, and unit o,

    w_o = A_o z + b_o,    dot_o = <w_o, x>,    norm2_o = <w_o, w_o>.

All w_o of all positions together are N x d x out numbers, hundreds of times the input. Two exact formulations avoid them,
working through chunks of positions:

* by rank:  dot_o = <A_o^T x, z> + <b_o, x> and norm2_o = |R_o [z, 1]|^2 with [A_o, b_o] = Q_o R_o. The products of a
  chunk are N x r x out numbers. R_o keeps the accuracy that a Gram matrix would lose when z lies in a weak direction of A_o.
* by unit:  w_o itself, one unit at a time, N x d numbers. For high ranks.

Legend: B images, N positions (B * H_out * W_out), C input channels, k kernel, d = C * k * k, r rank, O units.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 2**20  # of one temporary of a chunk; 4 MiB in fp32 stays in a CPU's last-level cache
CHUNK_NUMBERS_CUDA = 2**26  # large products keep a GPU busy; not measured


def unfold(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Patches of ``x`` (B, C, H, W) as rows (N, d), d ordered channel, row, column as torch.nn.functional.unfold does."""
    if kernel == 1 and padding == 0:
        return x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    patches_BdL = F.unfold(x, kernel, stride=stride, padding=padding)
    return patches_BdL.transpose(1, 2).reshape(-1, patches_BdL.shape[1])


def _fold(rows: Tensor, shape: torch.Size, kernel: int, stride: int, padding: int) -> Tensor:
    """Adjoint of :func:`unfold`: (N, d) summed back to ``shape`` (B, C, H, W)."""
    columns = rows.view(shape[0], -1, rows.shape[1]).transpose(1, 2)  # (N, d) -> (B, d, L)
    return F.fold(columns, shape[2:], kernel, stride=stride, padding=padding)


def dynamic_dot(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int, with_norm: bool):
    """Dot products and squared weight norms of every unit at every position.

    Saves only its arguments for backward. Differentiable once, in every tensor argument.

    Args:
        x: input (B, C, H, W).
        z: projections B x of every patch, (N, r).
        weight: A, (O, d, r).
        bias: b, (O, d), or None.
        kernel, stride, padding: geometry of the patches.
        with_norm: whether norm2 is wanted; it costs more than the dot product where r is close to d.

    Returns:
        dot (N, O), and norm2 (N, O) or None.
    """
    by_rank = weight.shape[2] + 1 <= 65 and 2 * (weight.shape[2] + 1) <= weight.shape[1] and z.shape[0] >= 8 * weight.shape[2]
    formulation = _ByRank if by_rank else _ByUnit
    dot, norm2 = formulation.apply(x, z, weight, bias, (kernel, stride, padding), with_norm)
    return dot, norm2 if with_norm else None


def _chunks(positions: int, numbers_each: int, device: torch.device) -> list[slice]:
    budget = CHUNK_NUMBERS_CUDA if device.type == "cuda" else CHUNK_NUMBERS
    step = max(64, budget // numbers_each)
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


class _ByRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, bias, geometry, with_norm):
        ctx.save_for_backward(x, z, weight, bias)
        ctx.geometry, ctx.with_norm = geometry, with_norm
        rows, flat = unfold(x, *geometry), _flat(weight)
        dot = rows @ bias.t() if bias is not None else rows.new_zeros(len(rows), len(weight))
        norm2 = torch.empty_like(dot) if with_norm else dot.new_empty(0)
        if with_norm:
            z1, factor = _homogeneous(z, bias), _flat(_triangular(weight, bias))
        for part in _chunks(len(rows), flat.shape[1], x.device):
            products = (rows[part] @ flat).view(-1, weight.shape[2], len(weight))  # A_o^T x: (n, r, O)
            dot[part] += products.mul_(z[part, :, None]).sum(1)
            if with_norm:
                images = (z1[part] @ factor).view(-1, factor.shape[1] // len(weight), len(weight))  # R_o [z, 1]
                torch.sum(images.square_(), 1, out=norm2[part])
        return dot, norm2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_dot, grad_norm2):
        x, z, weight, bias = ctx.saved_tensors
        needs_x, needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        with_norm = ctx.with_norm and (needs_z or needs_weight or needs_bias)
        units, rank = len(weight), weight.shape[2]
        rows, flat = unfold(x, *ctx.geometry), _flat(weight)
        grad_rows = (grad_dot @ bias if bias is not None else torch.zeros_like(rows)) if needs_x else None
        grad_z = torch.zeros_like(z) if needs_z else None
        grad_flat = torch.zeros_like(flat) if needs_weight else None
        if with_norm:
            z1, triangular = _homogeneous(z, bias), _triangular(weight, bias)
            factor = _flat(triangular)
            moments = z1.new_zeros(z1.shape[1], units * z1.shape[1])  # sum over positions of grad_norm2_o [z,1] [z,1]^T
        for part in _chunks(len(rows), flat.shape[1], x.device):
            grad = grad_dot[part, None, :]
            if needs_x or needs_weight:
                outer = (z[part, :, None] * grad).flatten(1)  # (n, r * O)
                if needs_x:
                    grad_rows[part].addmm_(outer, flat.t())
                if needs_weight:
                    grad_flat.addmm_(rows[part].t(), outer)
            if needs_z:
                grad_z[part] += (rows[part] @ flat).view(-1, rank, units).mul_(grad).sum(2)
            if with_norm:
                scaled = 2 * grad_norm2[part, None, :]
                images = (z1[part] @ factor).view(-1, factor.shape[1] // units, units)
                if needs_z:
                    grad_z[part] += (images.mul_(scaled).flatten(1) @ factor.t())[:, :rank]
                moments.addmm_(z1[part].t(), (z1[part, :, None] * scaled).flatten(1))
        grad_weight = grad_flat.view(-1, rank, units).permute(2, 0, 1) if needs_weight else None
        grad_bias = grad_dot.t() @ rows if needs_bias else None
        if with_norm and (needs_weight or needs_bias):
            full = weight if bias is None else torch.cat([weight, bias[:, :, None]], 2)  # (O, d, r')
            norm_part = full @ moments.view(z1.shape[1], z1.shape[1], units).permute(2, 0, 1)
            grad_weight = grad_weight + norm_part[:, :, :rank] if needs_weight else None
            grad_bias = grad_bias + norm_part[:, :, rank] if needs_bias else None
        grad_x = _fold(grad_rows, x.shape, *ctx.geometry) if needs_x else None
        return grad_x, grad_z, grad_weight, grad_bias, None, None


def _flat(weight: Tensor) -> Tensor:
    """(O, i, j) -> (i, j * O): one matrix product serves all units, and sums over j run along contiguous units."""
    return weight.permute(1, 2, 0).reshape(weight.shape[1], -1)


def _homogeneous(z: Tensor, bias: Tensor | None) -> Tensor:
    """[z, 1], so that the bias is one more column of A; z itself without bias."""
    return z if bias is None else torch.cat([z, z.new_ones(len(z), 1)], 1)


def _triangular(weight: Tensor, bias: Tensor | None) -> Tensor:
    """R_o^T with [A_o, b_o] = Q_o R_o: (O, r', min(d, r'))."""
    full = weight if bias is None else torch.cat([weight, bias[:, :, None]], 2)
    return torch.linalg.qr(full, mode="r").R.transpose(1, 2)


class _ByUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, bias, geometry, with_norm):
        ctx.save_for_backward(x, z, weight, bias)
        ctx.geometry, ctx.with_norm = geometry, with_norm
        rows = unfold(x, *geometry)
        dot = rows.new_empty(len(weight), len(rows))
        norm2 = torch.empty_like(dot) if with_norm else dot.new_empty(0, 0)
        for part in _chunks(len(rows), rows.shape[1], x.device):
            for unit in range(len(weight)):
                w = _weights(z[part], weight, bias, unit)
                if with_norm:
                    torch.sum(w.square(), 1, out=norm2[unit, part])
                torch.sum(w.mul_(rows[part]), 1, out=dot[unit, part])
        return dot.t(), norm2.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_dot, grad_norm2):
        x, z, weight, bias = ctx.saved_tensors
        needs_x, needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        rows = unfold(x, *ctx.geometry)
        grad_rows = torch.zeros_like(rows) if needs_x else None
        grad_z = torch.zeros_like(z) if needs_z else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        for part in _chunks(len(rows), rows.shape[1], x.device):
            for unit in range(len(weight)):
                w = _weights(z[part], weight, bias, unit)
                grad = grad_dot[part, unit, None]
                if needs_x:
                    grad_rows[part].addcmul_(w, grad)
                if not (needs_z or needs_weight or needs_bias):
                    continue
                grad_w = w.mul_(2 * grad_norm2[part, unit, None]) if ctx.with_norm else w.zero_()
                grad_w.addcmul_(rows[part], grad)
                if needs_z:
                    grad_z[part].addmm_(grad_w, weight[unit])
                if needs_weight:
                    grad_weight[unit].addmm_(grad_w.t(), z[part])
                if needs_bias:
                    grad_bias[unit] += grad_w.sum(0)
        grad_x = _fold(grad_rows, x.shape, *ctx.geometry) if needs_x else None
        return grad_x, grad_z, grad_weight, grad_bias, None, None


def _weights(z: Tensor, weight: Tensor, bias: Tensor | None, unit: int) -> Tensor:
    """w_o of one unit at the positions of ``z`` (n, r): (n, d)."""
    return z @ weight[unit].t() if bias is None else torch.addmm(bias[unit], z, weight[unit].t())
