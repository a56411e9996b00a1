"""Dry run of a training step: what it computes, moves and keeps, operation by operation.

The dry run is a forward and a backward pass over tensors on the meta device, which have shapes but
no values. It sees every operation that torch would run, with its operands and in its order, and
counts storages from their birth to their death, which gives the peak.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.dau.chunks import Gradients, Needs
from pipeline.models.dau.fused import MAX_RANK
from pipeline.models.dau.kernels import use_kernels

Kind = Literal["convolution", "product", "dau", "normalisation", "pooling", "copy", "elementwise"]
# Kinds by torch's names of operations; every other operation is elementwise.
KINDS: dict[str, Kind] = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "mm": "product",
    "addmm": "product",
    "addmm_": "product",
    "bmm": "product",
    "native_batch_norm": "normalisation",
    "native_batch_norm_backward": "normalisation",
    "max_pool2d_with_indices": "pooling",
    "max_pool2d_with_indices_backward": "pooling",
    "clone": "copy",
    "copy_": "copy",
    "cat": "copy",
    "constant_pad_nd": "copy",
}


@dataclass(frozen=True)
class Operation:
    """One operation of a step."""

    kind: Kind
    """What the operation does."""
    backward: bool
    """Whether it is the gradient of a convolution, normalisation or pooling."""
    multiply_adds: int
    """Multiply-adds of convolutions, products and DAUs; 0 for the others."""
    bytes: int
    """Bytes read and written."""
    written: int
    """Bytes of the largest result."""
    fresh: bool
    """Whether the result is new memory."""
    shape: tuple[int, ...] = ()
    """Sizes that decide the speed.

    (input channels of a group, output channels, kernel area) of a convolution; (m, k, n) of a
    product; (values of a patch, rank, units) of a DAU.
    """


@dataclass(frozen=True)
class Work:
    """The work of one forward and backward pass."""

    images: int
    """Images in the batch."""
    operations: tuple[Operation, ...]
    """Operations in the order in which they run."""
    peak_bytes: int
    """Most bytes alive at once, without parameters, buffers and gradients."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all operations."""
        return sum(operation.multiply_adds for operation in self.operations)


def trace(model: nn.Module, input_size: Sequence[int], images: int, *, fused: bool) -> Work:
    """Record the work of a training step of a model on the meta device.

    Args:
        model: on the meta device.
        input_size: (C, H, W) of an image.
        images: size of the batch.
        fused: whether a DAU is one operation, as in its CUDA kernels, or the many of ``chunked``,
            as on a processor.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        # With gradients in place, a step makes none that would count as alive.
        parameter.grad = torch.empty_like(parameter)
    x = torch.empty(images, *input_size, device="meta", dtype=parameters[0].dtype)
    recorder = _Recorder()
    with use_kernels(_FusedKernels(recorder)) if fused else nullcontext(), recorder:
        logits = model.train()(x)
        logits.backward(torch.empty_like(logits))
    for parameter in parameters:
        parameter.grad = None
    return Work(images, tuple(recorder.operations), recorder.peak)


# torch does not type the constructor and the subclass hook of TorchDispatchMode.
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation and the bytes of its results that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.alive = self.peak = 0
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            self._born(tensor)
        name = function._opname
        # A silent operation only reserves memory or makes a view.
        silent = "empty" in name or (not new and not function._schema.is_mutable)
        if made and not silent:
            self.operations.append(_operation(name, args, given, made, bool(new)))
        return results

    def add(self, operation: Operation) -> None:
        """Record an operation that no call of torch stands for."""
        self.operations.append(operation)

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, self._died)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _died(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.alive -= self._sizes.pop(reference, 0)


def _operation(
    name: str, args: Any, given: list[Tensor], made: list[Tensor], fresh: bool
) -> Operation:
    kind = KINDS.get(name, "elementwise")
    moved = sum(_bytes(tensor) for tensor in [*given, *made])
    written = max(_bytes(tensor) for tensor in made)
    multiply_adds = 0
    shape: tuple[int, ...] = ()
    if kind == "convolution":
        backward = name.endswith("backward")
        weight, output = (args[2], args[0]) if backward else (args[1], made[0])
        channels, area = weight.shape[1], weight[0, 0].numel()
        multiply_adds = output.numel() * weight[0].numel() * (sum(args[-1][:2]) if backward else 1)
        shape = (channels, weight.shape[0], area)
    elif kind == "product":
        left, right = args[1:3] if name.startswith("addmm") else args[:2]
        multiply_adds = left.numel() * right.shape[-1]
        shape = (left.shape[-2], left.shape[-1], right.shape[-1])
    return Operation(kind, name.endswith("backward"), multiply_adds, moved, written, fresh, shape)


def _bytes(tensor: Tensor) -> int:
    """Bytes that a pass over ``tensor`` touches: of a broadcast one, only its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _FusedKernels:
    """Kernels that give results of the right shape and record the work of the CUDA kernels.

    A DAU's products are one operation in each pass, which touches its operands once
    (docs/triton.md). The multiply-adds are those of the formulation by rank.
    """

    def __init__(self, recorder: _Recorder):
        self.recorder = recorder

    def forward(
        self, rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
    ) -> tuple[Tensor, Tensor | None]:
        exact = torch.promote_types(rows.dtype, torch.float32)
        dot = rows.new_empty(len(rows), len(weight), dtype=exact)
        of_dot, of_norm = _products(weight, bias, with_norm)
        self._record(rows, z, weight, False, of_dot + of_norm)
        return dot, torch.empty_like(dot) if with_norm else None

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
        of_dot, of_norm = _products(weight, bias, grad_norm2 is not None)
        self._record(rows, z, weight, True, 3 * of_dot + 2 * of_norm)
        needs_rows, needs_z, needs_weight, needs_bias = needs
        return (
            torch.empty_like(rows) if needs_rows else None,
            torch.empty_like(z) if needs_z else None,
            torch.empty_like(weight) if needs_weight else None,
            torch.empty_like(bias) if needs_bias and bias is not None else None,
        )

    def explain(self, z: Tensor, weight: Tensor, bias: Tensor | None, grad_dot: Tensor) -> Tensor:
        exact = torch.promote_types(z.dtype, torch.float32)
        explanations = z.new_empty(len(grad_dot), len(z), weight.shape[1], dtype=exact)  # (K, N, d)
        of_dot, _ = _products(weight, bias, False)
        for of_target in explanations:
            self._record(of_target, z, weight, True, of_dot)
        return explanations

    def _record(
        self, rows: Tensor, z: Tensor, weight: Tensor, backward: bool, per_position: int
    ) -> None:
        """Record one pass; ``per_position`` counts the multiply-adds of one position."""
        units, values, rank = weight.shape
        operands = sum(_bytes(operand) for operand in (rows, z, weight))
        # dot and norm2, or their gradients, in fp32
        outputs = 8 * len(rows) * units
        touched = (2 if backward else 1) * operands + outputs
        if rank > MAX_RANK:
            # The chunked kernels run here: the products of a chunk pass through memory, about seven
            # times in a step.
            products = len(rows) * rank * units * rows.element_size()
            touched += (5 if backward else 2) * products
        shape = (values, rank, units)
        multiply_adds = per_position * len(rows)
        self.recorder.add(
            Operation("dau", backward, multiply_adds, touched, _bytes(rows), True, shape)
        )


def _products(weight: Tensor, bias: Tensor | None, with_norm: bool) -> tuple[int, int]:
    """Multiply-adds of one position for the dot product and for the norm (0 if not wanted)."""
    units, values, rank = weight.shape
    biased = rank + (bias is not None)
    of_dot = units * (values * biased + rank)
    of_norm = units * min(values, biased) * biased if with_norm else 0
    return of_dot, of_norm
