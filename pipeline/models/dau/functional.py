"""The dot product and the weight norm of Dynamic Alignment Units as one differentiable function
(arXiv 2109.13004, eq. 1-4).

Which kernels compute it is decided here: ``fused`` on CUDA once its self-check has passed, else
``chunked``.

Legend: B images, N positions (B * H_out * W_out), C input channels, k kernel, d = k * k * C, r
    rank, O units, K targets.
"""

import warnings
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.dau import chunked, fused


class Geometry(NamedTuple):
    """How patches lie in an image."""

    kernel: int
    stride: int
    padding: int


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches of ``x`` (B, C, H, W) as rows (N, d), d ordered row, column, channel.

    With channels innermost a patch is k runs of k * C neighbouring numbers; ordered channel first
    it is C * k runs of k.
    """
    kernel, stride, padding = geometry
    x = F.pad(x, (padding,) * 4).contiguous(memory_format=torch.channels_last)
    # (B, C, H', W', k, k), a view
    windows = x.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, kernel * kernel * x.shape[1])


def fold(rows: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Adjoint of :func:`unfold`: rows (N, d) summed back to ``shape`` (B, C, H, W), in
    channels-last memory.
    """
    kernel, stride, padding = geometry
    batch, channels, *size = shape
    high, wide = ((length + 2 * padding - kernel) // stride + 1 for length in size)
    patches = rows.view(batch, high, wide, kernel, kernel, channels)
    if kernel == stride == 1:
        padded = patches[:, :, :, 0, 0]
    else:
        padded = rows.new_zeros(batch, size[0] + 2 * padding, size[1] + 2 * padding, channels)
        for row in range(kernel):
            for column in range(kernel):
                target = padded[
                    :,
                    row : row + stride * (high - 1) + 1 : stride,
                    column : column + stride * (wide - 1) + 1 : stride,
                ]
                target += patches[:, :, :, row, column]
    return padded[:, padding : padding + size[0], padding : padding + size[1]].permute(0, 3, 1, 2)


class Explains(Protocol):
    """Whose ``explaining`` decides, at the time of a backward pass, whether that holds the dynamic
    weights fixed.
    """

    explaining: bool


@torch.compiler.disable
def dynamic_dot(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    with_norm: bool,
    owner: Explains,
) -> tuple[Tensor, Tensor | None]:
    """Dot products and squared weight norms of every unit at every position.

    Saves only its arguments for backward. ``torch.compile`` breaks the graph here.

    A usual backward pass differentiates every tensor argument, once. One with ``owner.explaining``
    (explanation mode) gives the gradient of dot in ``x`` for fixed weights, sum_o a_o w_o, and
    nothing else; under ``torch.func.vmap`` it forms the dynamic weights once for all targets. That
    gradient can be differentiated again, in a, z, weight and bias.

    Args:
        x: input (B, C, H, W), in fp32, fp64 or bf16 as the other operands.
        z: projections B x of every patch, (N, r).
        weight: A, (O, d, r).
        bias: b, (O, d), or None.
        geometry: of the patches.
        with_norm: whether norm2 is wanted; it costs more than the dot product where r is close to
            d.
        owner: asked for ``explaining``.

    Returns:
        dot (N, O), and norm2 (N, O) or None; in fp32 for bf16 operands.
    """
    dot, norm2 = _DynamicDot.apply(x, z, weight, bias, geometry, with_norm, owner)
    return dot, norm2


class _DynamicDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, bias, geometry, with_norm, owner):
        ctx.save_for_backward(x, z, weight, bias)
        ctx.geometry, ctx.with_norm, ctx.owner = geometry, with_norm, owner
        return _kernels(weight).forward(unfold(x, geometry), z, weight, bias, with_norm)

    @staticmethod
    def backward(ctx, grad_dot, grad_norm2):
        x, z, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if ctx.owner.explaining:
            return (
                _Explanation.apply(grad_dot, z, weight, bias, x.shape, ctx.geometry)
                if needs[0]
                else None,
                *[None] * 6,
            )
        if torch.is_grad_enabled():
            raise RuntimeError("DAUConv2d is differentiable once, except in explanation mode")
        rows = unfold(x, ctx.geometry)
        grad_norm2 = grad_norm2 if ctx.with_norm else None
        grad_rows, *others = _kernels(weight).backward(
            rows, z, weight, bias, grad_dot, grad_norm2, needs
        )
        grad_x = None if grad_rows is None else fold(grad_rows, x.shape, ctx.geometry)
        return grad_x, *others, None, None, None


class _Explanation(torch.autograd.Function):
    """The gradient in x with the dynamic weights held fixed, sum_o a_o w_o; under ``vmap`` for all
    K targets at once.
    """

    @staticmethod
    def forward(grad_dot, z, weight, bias, shape, geometry):
        return _Explanation.vmap(
            None, (0, *[None] * 5), grad_dot[None], z, weight, bias, shape, geometry
        )[0][0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info, in_dims, grad_dot, z, weight, bias, shape, geometry):
        grad_dot = grad_dot.movedim(in_dims[0], 0)  # (K, N, O)
        grad_rows = _kernels(weight).explain(z, weight, bias, grad_dot)  # (K, N, d)
        folded = fold(
            grad_rows.flatten(0, 1), torch.Size([len(grad_dot) * shape[0], *shape[1:]]), geometry
        )
        return folded.unflatten(0, (-1, shape[0])), 0

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """<grad, sum_o a_o w_o> is a dot product itself, of patches of ``grad`` in place of x."""
        grad_dot, z, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        rows, kernels = unfold(grad, ctx.geometry), _kernels(weight)
        of_dot = kernels.forward(rows, z, weight, bias, False)[0] if needs[0] else None
        return (
            of_dot,
            *kernels.backward(rows, z, weight, bias, grad_dot, None, (False, *needs[1:]))[1:],
            None,
            None,
        )


@torch.compiler.disable
def quotient(dot: Tensor, divisor: Tensor, owner: Explains) -> Tensor:
    """dot / divisor, both (N, O); with ``owner.explaining`` a backward pass holds the divisor
    fixed, as :func:`dynamic_dot` does w.
    """
    return _Quotient.apply(dot, divisor, owner)


class _Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dot, divisor, owner):
        y = dot / divisor
        ctx.save_for_backward(y, divisor)
        ctx.owner = owner
        return y

    @staticmethod
    def backward(ctx, grad):
        y, divisor = ctx.saved_tensors
        of_dot = grad / divisor
        return of_dot, None if ctx.owner.explaining else -of_dot * y, None


def _kernels(weight: Tensor) -> Any:
    """The module whose ``forward``, ``backward`` and ``explain`` compute a layer with this A."""
    if not weight.is_cuda or weight.shape[2] > fused.MAX_RANK or weight.dtype not in fused.DTYPES:
        return chunked
    reason = fused.self_check(weight.device, weight.dtype, reference)
    if reason is not None:
        warnings.warn(
            f"the fused DAU kernels are not used on {weight.device}: {reason}", stacklevel=2
        )
        return chunked
    return fused


def reference(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the fused kernels must agree with: ``chunked`` as a differentiable function of patches
    (N, d).
    """
    dot, norm2 = _Reference.apply(rows, z, weight, bias)
    return dot, norm2


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, z, weight, bias):
        ctx.save_for_backward(rows, z, weight, bias)
        return chunked.forward(rows, z, weight, bias, True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_dot, grad_norm2):
        return chunked.backward(*ctx.saved_tensors, grad_dot, grad_norm2, ctx.needs_input_grad)
