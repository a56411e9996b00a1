"""The dot product and the weight norm of Dynamic Alignment Units as a differentiable function.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, eq. 1-4. ``kernels`` decides what computes it.

Legend: B images, N positions (B * H_out * W_out), C input channels, k kernel size, d = k * k * C,
r rank, O units, K targets.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from pipeline.models.dau.kernels import kernels_for


class Geometry(NamedTuple):
    """How patches lie in an image."""

    kernel: int
    """Height and width of a patch."""
    stride: int
    """Distance between neighbouring patches."""
    padding: int
    """Width of the border of zeros around the image."""


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """Gather the patches of ``x`` (B, C, H, W) as rows (N, d), d ordered row, column, channel.

    With channels innermost a patch is k runs of k * C neighbouring numbers; ordered channel first
    it is C * k runs of k.
    """
    kernel, stride, padding = geometry
    x = pad(x, (padding,) * 4).contiguous(memory_format=torch.channels_last)
    # (B, C, H', W', k, k), a view
    windows = x.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, kernel * kernel * x.shape[1])


def fold(rows: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Sum rows (N, d) back to ``shape`` (B, C, H, W), the adjoint of :func:`unfold`.

    The result is in channels-last memory.
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
    """The owner of a flag that a backward pass reads when it runs."""

    explaining: bool
    """Whether the pass holds the dynamic weights fixed."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not type it
def dynamic_dot(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    with_norm: bool,
    owner: Explains,
) -> tuple[Tensor, Tensor | None]:
    """Compute the dot products and squared weight norms of every unit at every position.

    Saves only its arguments for backward. ``torch.compile`` breaks the graph here.

    A usual backward pass differentiates every tensor argument, once. A pass with
    ``owner.explaining`` (explanation mode) gives the gradient of dot in ``x`` for fixed weights,
    sum_o a_o w_o, and nothing else; under ``torch.func.vmap`` it forms the dynamic weights once for
    all targets. That gradient can be differentiated again, in a, z, weight and bias.

    Args:
        x: input (B, C, H, W), in fp32, fp64 or bf16 like the other operands.
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
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        with_norm: bool,
        owner: Explains,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, z, weight, bias)
        ctx.geometry, ctx.with_norm, ctx.owner = geometry, with_norm, owner
        return kernels_for(weight).forward(unfold(x, geometry), z, weight, bias, with_norm)

    @staticmethod
    def backward(
        ctx: Any, grad_dot: Tensor, grad_norm2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, z, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if ctx.owner.explaining:
            explanation = None
            if needs[0]:
                explanation = _Explanation.apply(grad_dot, z, weight, bias, x.shape, ctx.geometry)
            return explanation, *[None] * 6
        if torch.is_grad_enabled():
            raise RuntimeError("DAUConv2d is differentiable once, except in explanation mode")
        rows = unfold(x, ctx.geometry)
        grad_norm2 = grad_norm2 if ctx.with_norm else None
        grad_rows, *others = kernels_for(weight).backward(
            rows, z, weight, bias, grad_dot, grad_norm2, needs
        )
        grad_x = None if grad_rows is None else fold(grad_rows, x.shape, ctx.geometry)
        return grad_x, *others, None, None, None


class _Explanation(torch.autograd.Function):
    """The gradient in x for fixed dynamic weights, sum_o a_o w_o.

    Under ``vmap`` it is computed for all K targets at once.
    """

    @staticmethod
    def forward(
        grad_dot: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        geometry: Geometry,
    ) -> Tensor:
        return _explain(grad_dot[None], z, weight, bias, shape, geometry)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        grad_dot: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        geometry: Geometry,
    ) -> tuple[Tensor, int]:
        # Of all arguments, only the cotangent differs between the targets.
        assert in_dims[0] is not None
        cotangents = grad_dot.movedim(in_dims[0], 0)  # (K, N, O)
        return _explain(cotangents, z, weight, bias, shape, geometry), 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Use that <grad, sum_o a_o w_o> is a dot product, of patches of ``grad`` in place of x."""
        grad_dot, z, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        rows, kernels = unfold(grad, ctx.geometry), kernels_for(weight)
        of_dot = kernels.forward(rows, z, weight, bias, False)[0] if needs[0] else None
        _, *others = kernels.backward(
            rows, z, weight, bias, grad_dot, None, (False, needs[1], needs[2], needs[3])
        )
        return of_dot, *others, None, None


def _explain(
    grad_dot: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: torch.Size,
    geometry: Geometry,
) -> Tensor:
    """Compute sum_o a_o w_o of K targets, folded: (K, N, O) -> (K, B, C, H, W)."""
    grad_rows = kernels_for(weight).explain(z, weight, bias, grad_dot)  # (K, N, d)
    images = torch.Size([len(grad_dot) * shape[0], *shape[1:]])
    folded = fold(grad_rows.flatten(0, 1), images, geometry)  # (K * B, C, H, W)
    return torch.unflatten(folded, 0, (-1, shape[0]))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not type it
def quotient(dot: Tensor, divisor: Tensor, owner: Explains) -> Tensor:
    """Compute dot / divisor, both (N, O).

    A backward pass with ``owner.explaining`` holds the divisor fixed, as :func:`dynamic_dot` holds
    the dynamic weights.
    """
    y: Tensor = _Quotient.apply(dot, divisor, owner)
    return y


class _Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dot: Tensor, divisor: Tensor, owner: Explains) -> Tensor:
        y = dot / divisor
        ctx.save_for_backward(y, divisor)
        ctx.owner = owner
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, divisor = ctx.saved_tensors
        of_dot = grad / divisor
        return of_dot, None if ctx.owner.explaining else -of_dot * y, None
