"""What a training step computes, moves and keeps, operation by operation, from a dry run on the
meta device.

The dry run is a forward and a backward pass over tensors that have shapes and no values: every
operation that torch would run is seen with its operands, in its order, and storages are counted
from their birth to their death, which gives the peak.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.dau import functional
from pipeline.models.dau.fused import MAX_RANK

Kind = Literal["convolution", "product", "dau", "normalisation", "pooling", "copy", "elementwise"]
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
    backward: bool
    """Whether the gradient of a convolution, normalisation or pooling."""
    multiply_adds: int
    bytes: int
    """Read and written."""
    written: int
    """Bytes of the largest result."""
    fresh: bool
    """Whether the result is new memory."""
    shape: tuple[int, ...] = ()
    """Of a convolution (input channels of a group, output channels, kernel area); of a product (m,
    k, n).
    """


@dataclass(frozen=True)
class Work:
    """Of one forward and backward pass over ``images`` images."""

    images: int
    operations: tuple[Operation, ...]
    peak_bytes: int
    """Of all that is alive at once, without parameters, buffers and gradients."""

    @property
    def multiply_adds(self) -> int:
        return sum(operation.multiply_adds for operation in self.operations)


def trace(model: nn.Module, input_size: Sequence[int], images: int, *, fused: bool) -> Work:
    """The work of ``model``, which is on the meta device, on ``images`` images of ``input_size``
    (C, H, W).

    Args:
        fused: whether a DAU is one operation, as in its CUDA kernels, or the many of ``chunked``,
            as on a processor.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        # so that the gradients are not counted among what is alive
        parameter.grad = torch.empty_like(parameter)
    x = torch.empty(images, *input_size, device="meta", dtype=parameters[0].dtype)
    recorder = _Recorder([*parameters, *model.buffers()])
    with _fused(recorder) if fused else nullcontext(), recorder:
        logits = model.train()(x)
        logits.backward(torch.empty_like(logits))
    for parameter in parameters:
        parameter.grad = None
    return Work(images, tuple(recorder.operations), recorder.peak)


class _Recorder(TorchDispatchMode):
    """Notes every operation, and what is alive."""

    def __init__(self, permanent: Sequence[Tensor]):
        super().__init__()
        self.operations: list[Operation] = []
        self.alive = self.peak = 0
        self._sizes: dict[weakref.ref, int] = {}
        self._permanent = {tensor.untyped_storage()._cdata for tensor in permanent}

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
        # reserves memory, or is a view
        silent = "empty" in name or (not new and not function._schema.is_mutable)
        if made and not silent:
            self.operations.append(_operation(name, args, given, made, bool(new)))
        return results

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, self._died)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _died(self, reference: weakref.ref) -> None:
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
    """What a pass over ``tensor`` touches; a broadcast one touches its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def _fused(recorder: _Recorder) -> Iterator[None]:
    """In this block a DAU's products are one operation for each pass, which touches its operands
    once (docs/triton.md).
    """
    original = functional._kernels
    functional._kernels = lambda weight: _FusedKernels(recorder)
    try:
        yield
    finally:
        functional._kernels = original


class _FusedKernels:
    """Results of the DAU's kernels without their computation; the products are those of the
    formulation by rank.
    """

    def __init__(self, recorder: _Recorder):
        self.recorder = recorder

    def forward(
        self, rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, with_norm: bool
    ) -> tuple[Tensor, Tensor | None]:
        dot = rows.new_empty(
            len(rows), len(weight), dtype=torch.promote_types(rows.dtype, torch.float32)
        )
        self._note(rows, z, weight, bias, False, with_norm)
        return dot, torch.empty_like(dot) if with_norm else None

    def backward(
        self,
        rows: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_dot: Tensor,
        grad_norm2: Tensor | None,
        needs: Any,
    ) -> Any:
        self._note(rows, z, weight, bias, True, grad_norm2 is not None)
        operands = (rows, z, weight, bias)
        return tuple(
            torch.empty_like(operand) if need and operand is not None else None
            for need, operand in zip(needs, operands, strict=True)
        )

    def _note(
        self,
        rows: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backward: bool,
        with_norm: bool,
    ) -> None:
        units, values, rank = weight.shape
        biased = rank + (bias is not None)
        of_dot, of_norm = (
            units * (values * biased + rank),
            units * min(values, biased) * biased if with_norm else 0,
        )
        per_position = 3 * of_dot + 2 * of_norm if backward else of_dot + of_norm
        touched = (2 if backward else 1) * sum(
            _bytes(operand) for operand in (rows, z, weight)
        ) + 8 * len(rows) * units
        # products of a chunk go through memory instead: about seven passes over them in a step
        if rank > MAX_RANK:
            touched += (5 if backward else 2) * len(rows) * rank * units * rows.element_size()
        self.recorder.add(
            Operation(
                "dau",
                backward,
                per_position * len(rows),
                touched,
                _bytes(rows),
                True,
                (values, rank, units),
            )
        )
