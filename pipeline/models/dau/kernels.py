"""The kernels of a Dynamic Alignment Unit: what they compute, and which of them a layer uses.

A layer uses ``fused`` on a CUDA device where its self-check has passed, ``chunked`` elsewhere.

Legend: N positions, d values of a patch, r rank, O units, K targets, a = dL/d dot.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.dau import chunked, fused
from pipeline.models.dau.chunks import Gradients, Needs

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """The computation behind a layer; a module or an object that has these three functions."""

    def forward(
        self, rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the dot products and squared weight norms of every unit at every position.

        Args:
            rows: patches x, (N, d).
            z: projections, (N, r).
            weight: A, (O, d, r).
            bias: b, (O, d), or None.
            with_norm: whether norm2 is wanted.

        Returns:
            dot (N, O), and norm2 (N, O) or None, in at least fp32.
        """

    def backward(
        self,
        rows: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_dot: Tensor,
        grad_norm2: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        """Compute the gradients of :meth:`forward` in rows, z, weight and bias.

        Args:
            rows: as in :meth:`forward`.
            z: as in :meth:`forward`.
            weight: as in :meth:`forward`.
            bias: as in :meth:`forward`.
            grad_dot: dL/d dot, (N, O).
            grad_norm2: dL/d norm2, (N, O), or None.
            needs: which of the four gradients are wanted; the others are None.
        """

    def explain(self, z: Tensor, weight: Tensor, bias: Tensor | None, grad_dot: Tensor) -> Tensor:
        """Compute sum_o a_o w_o for K targets, from ``grad_dot`` (K, N, O): (K, N, d)."""


# Not a ContextVar: on a GPU, autograd runs the backward pass in threads of its own, which have
# contexts of their own.
_replacement: Kernels | None = None


@contextmanager
def use_kernels(kernels: Kernels) -> Iterator[None]:
    """Use ``kernels`` for every layer inside this block, in every thread of the process.

    Blocks may be nested: the end of a block, by an error too, brings back what was used before it.
    The choice is the process's own, so two threads must not open blocks at the same time.
    """
    global _replacement
    before = _replacement
    _replacement = kernels
    try:
        yield
    finally:
        _replacement = before


def kernels_for(weight: Tensor) -> Kernels:
    """Choose the kernels for a layer whose A, (O, d, r), is ``weight``."""
    if _replacement is not None:
        return _replacement
    if not weight.is_cuda or weight.shape[2] > fused.MAX_RANK or weight.dtype not in fused.DTYPES:
        return chunked
    if not _fused_agree(weight.device, weight.dtype):
        return chunked
    return fused


@functools.cache
def _fused_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``fused`` passes its self-check; logs once per device and dtype why it does not."""
    reason = fused.self_check(device, dtype, reference)
    if reason is not None:
        log.warning("the fused DAU kernels are not used on %s: %s", device, reason)
    return reason is None


def reference(
    rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Compute dot and norm2 by ``chunked``, differentiably: what ``fused`` must agree with."""
    dot, norm2 = _Reference.apply(rows, z, weight, bias)
    return dot, norm2


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(rows, z, weight, bias)
        return chunked.forward(rows, z, weight, bias, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_dot: Tensor, grad_norm2: Tensor) -> Gradients:
        rows, z, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return chunked.backward(rows, z, weight, bias, grad_dot, grad_norm2, needs)
