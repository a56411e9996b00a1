"""Dynamic Alignment Units on CUDA: what runs the Triton kernels of ``fused_kernels``.

Source of the formulas: arXiv 2109.13004, eq. 1-4. With w_o = A_o z + b_o, a = dL/d dot and
c = 2 dL/d norm2, both (N, O), everything is a matrix product over the units:

    dot_o     = <w_o, x>, norm2_o = <w_o, w_o>            w_o stays in registers, by blocks
    grad_rows = sum_o a_o (A_o z + b_o)                   all of an explanation's backward pass
    grad_z    = sum_o a_o A_o^T x + c_o (G_o z + A_o^T b_o)             G_o = A_o^T A_o
    grad_A_o  = sum_n a_o x z^T + A_o M_o + b_o h_o^T     M_o = sum_n c_o z z^T, h_o = sum_n c_o z
    grad_b_o  = sum_n a_o x + A_o h_o + b_o sum_n c_o

No w is computed twice: 4 P + 2 Q operations with P = 2 N D R O and Q = 2 N R^2 O, against 5 P where
the backward pass recomputes w. A Gram matrix ruins a norm where z lies in a weak direction of A_o,
but hardly its gradient: G_o z errs about 4 times as much as A_o^T (A_o z), whatever the condition
of A_o. Everything is summed in fp32 and in a fixed order. The speed is not measured on a GPU.

Triton itself is imported at the first launch: the module can be imported without it.

Legend: N positions, D values of a patch, R rank, O units, K targets.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.dau.chunks import Gradients, Needs
from pipeline.models.dau.launches import Launch, dot_precision, launches

# The highest rank that is compiled and checked for spills; above it plain PyTorch is used.
MAX_RANK = 256
# Data types that the operands may have.
DTYPES = (torch.float32, torch.bfloat16)


def _run(launch: Launch, **arguments: Tensor | int | None) -> None:
    # Needs Triton.
    from pipeline.models.dau import fused_kernels

    kernel = getattr(fused_kernels, launch.kernel)
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    # torch does not type device_of.
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        kernel[launch.grid](**arguments, **launch.constants, **launch.options)


def forward(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the dot products and squared weight norms of every unit at every position.

    Args:
        rows: patches x, (N, D), of a dtype in ``DTYPES`` like the other operands.
        z: projections, (N, R), R at most ``MAX_RANK``.
        weight: A, (O, D, R).
        bias: b, (O, D), or None.
        with_norm: whether norm2 is wanted.

    Returns:
        dot (N, O) and norm2 (N, O) or None, fp32, with neighbouring positions next to each other in
        memory.
    """
    units, values, rank = weight.shape
    dot = torch.empty(units, len(rows), dtype=torch.float32, device=rows.device)
    norm2 = torch.empty_like(dot) if with_norm else None
    launch = launches(len(rows), values, rank, units, dot_precision(rows.dtype))["forward"]
    operands = dict(rows=rows.contiguous(), z=z.contiguous(), weight=weight.contiguous())
    bias = None if bias is None else bias.contiguous()
    _run(launch, **operands, bias=bias, dot=dot, norm2=norm2, positions=len(rows))
    return dot.t(), None if norm2 is None else norm2.t()


def backward(
    rows: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_dot: Tensor,
    grad_norm2: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Compute the gradients of :func:`forward` in fp32, as ``kernels.Kernels.backward`` says."""
    needs_rows, needs_z, needs_weight, needs_bias = needs
    rows, z, weight = rows.contiguous(), z.contiguous(), weight.contiguous()
    plan = launches(
        len(rows), weight.shape[1], weight.shape[2], len(weight), dot_precision(rows.dtype)
    )
    # Both (O, N): a unit's factors are read by neighbouring positions.
    a = grad_dot.t().float().contiguous()
    c = None if grad_norm2 is None else grad_norm2.t().float().mul(2).contiguous()
    grad_rows = grad_z = grad_weight = grad_bias = None
    if needs_rows:
        grad_rows = explain(z, weight, bias, grad_dot[None])[0]
    if needs_z:
        grad_z = z.new_zeros(z.shape, dtype=torch.float32)
        _run(plan["grad_z"], left=rows, scale=a, matrices=weight, out=grad_z, positions=len(rows))
    if needs_weight:
        grad_weight = _outer(plan["grad_weight"], rows, z, a)
    if needs_bias:
        grad_bias = a @ rows.float()
    if c is not None and (needs_z or needs_weight or needs_bias):
        _add_gradients_of_norm2(
            plan,
            z.float(),
            weight.float(),
            None if bias is None else bias.float(),
            c,
            grad_z,
            grad_weight,
            grad_bias,
        )
    return grad_rows, grad_z, grad_weight, grad_bias


def explain(z: Tensor, weight: Tensor, bias: Tensor | None, grad_dot: Tensor) -> Tensor:
    """Compute sum_o a_o w_o for several targets: (K, N, O) -> (K, N, D), fp32.

    This is the whole backward pass in explanation mode.
    """
    z, weight = z.contiguous(), weight.contiguous()
    units, values, rank = weight.shape
    launch = launches(len(z), values, rank, units, dot_precision(z.dtype))["grad_rows"]
    grad_rows = grad_dot.new_zeros(len(grad_dot), len(z), values, dtype=torch.float32)
    for target, out in zip(grad_dot.float(), grad_rows, strict=True):
        if bias is not None:
            torch.mm(target, bias.float(), out=out)
        _run(
            launch,
            left=z,
            scale=target.t().contiguous(),
            matrices=weight,
            out=out,
            positions=len(z),
        )
    return grad_rows


def _add_gradients_of_norm2(
    plan: dict[str, Launch],
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c: Tensor,
    grad_z: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Add what c (O, N) contributes to those gradients that are not None.

    The operands must be fp32: a bf16 Gram matrix is too coarse.
    """
    h = c @ z  # (O, R)
    if grad_z is not None:
        gram = weight.transpose(1, 2) @ weight  # (O, R, R)
        if bias is not None:
            grad_z += c.t() @ (bias[:, None] @ weight)[:, 0]
        _run(plan["grad_z of norm2"], left=z, scale=c, matrices=gram, out=grad_z, positions=len(z))
    if grad_weight is not None:
        grad_weight.baddbmm_(weight, _outer(plan["grad_weight of norm2"], z, z, c))
        if bias is not None:
            grad_weight.addcmul_(bias[:, :, None], h[:, None, :])
    if grad_bias is not None and bias is not None:
        grad_bias += (weight @ h[:, :, None])[:, :, 0] + bias * c.sum(1, keepdim=True)


def _outer(launch: Launch, rows: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """Compute sum_n scale_on rows_n z_n^T, (O, D, R)."""
    splits = launch.grid[2]
    parts = torch.empty(
        splits, len(scale), rows.shape[1], z.shape[1], dtype=torch.float32, device=rows.device
    )
    _run(
        launch,
        rows=rows,
        z=z,
        scale=scale,
        out=parts,
        positions=len(rows),
        span=math.ceil(len(rows) / splits),
    )
    return parts[0] if splits == 1 else parts.sum(0)


@functools.cache
def self_check(
    device: torch.device, dtype: torch.dtype, reference: Callable[..., tuple[Tensor, Tensor]]
) -> str | None:
    """Compare both passes and explanation mode with plain PyTorch on small operands.

    A process does so once for each device and dtype.

    Args:
        device: a CUDA device.
        dtype: of the operands, one of ``DTYPES``.
        reference: differentiable, (rows, z, weight, bias) -> (dot, norm2), with the shapes of
            :func:`forward`; called in fp32.

    Returns:
        None if they agree, else one line that says why the kernels cannot be used. Never raises.
    """
    try:
        name = _difference(device, dtype, reference)
    except Exception as error:
        # No Triton, no C compiler, too old a device or driver: each fails in its own way, and each
        # means "do without".
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{name} differs from plain PyTorch in {dtype}" if name else None


def _difference(
    device: torch.device, dtype: torch.dtype, reference: Callable[..., tuple[Tensor, Tensor]]
) -> str | None:
    """Name the first result that is further than rounding from ``reference``, or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "rows": (70, 40),
        "z": (70, 20),
        "weight": (17, 40, 20),
        "bias": (17, 40),
        "dot": (70, 17),
        "norm2": (70, 17),
    }
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes.values()]
    rows, z, weight, bias = drawn[:4]
    grad_dot, grad_norm2 = (cotangent.float() for cotangent in drawn[4:])
    exact = [operand.detach().float().requires_grad_() for operand in drawn[:4]]
    with torch.enable_grad():
        outputs = reference(*exact)
        gradients = torch.autograd.grad(outputs, exact, [grad_dot, grad_norm2], retain_graph=True)
        (explanation,) = torch.autograd.grad(outputs[0], exact[0], grad_dot)
    ours = dict(zip(("dot", "norm2"), forward(rows, z, weight, bias, with_norm=True), strict=True))
    ours |= zip(
        ("gradient of x", "of z", "of weight", "of bias"),
        backward(rows, z, weight, bias, grad_dot, grad_norm2, (True, True, True, True)),
        strict=True,
    )
    ours["explanation"] = explain(z, weight, bias, grad_dot[None])[0]
    expected = [*outputs, *gradients, explanation]
    for (name, found), wanted in zip(ours.items(), expected, strict=True):
        assert found is not None
        # So written, a NaN differs.
        if not (found - wanted).norm() <= 1e-2 * wanted.norm():
            return name
    return None
