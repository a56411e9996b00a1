"""Chunks of positions, and what the two formulations of ``chunked`` share.

Legend: N positions, n positions of a chunk, d values of a patch, O units.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers in one temporary of a chunk; 4 MiB in fp32 stay in a CPU's last-level cache.
CHUNK_NUMBERS = 2**20
# Large products keep a GPU busy; not measured.
CHUNK_NUMBERS_CUDA = 2**26

Needs = tuple[bool, bool, bool, bool]
"""Whether the gradients of rows, z, weight and bias are wanted."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The gradients of rows, z, weight and bias."""


def chunks(z: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Divide the positions of ``z`` into chunks.

    Args:
        z: any tensor (N, ...), of which the dtype and the device are used, too.
        width: numbers per position of the buffer.

    Yields:
        The positions of a chunk, and a buffer (n, width), which all chunks share.
    """
    budget = CHUNK_NUMBERS_CUDA if z.is_cuda else CHUNK_NUMBERS
    step = min(max(64, budget // width), len(z))
    buffer = z.new_empty(step, width)
    for start in range(0, len(z), max(1, step)):
        stop = min(start + step, len(z))
        yield slice(start, stop), buffer[: stop - start]


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``out``, which may be of higher precision than the operands."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype of sums over operands of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def flatten_units(weight: Tensor) -> Tensor:
    """Reorder (O, i, j) to (i, j * O).

    One matrix product serves all units, and sums over j run along contiguous units.
    """
    return weight.permute(1, 2, 0).reshape(weight.shape[1], -1)
