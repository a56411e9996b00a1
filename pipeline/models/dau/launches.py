"""Launches of the DAU's Triton kernels: blocks, grid and precision of each by the layer's sizes.

This needs no Triton. Legend: N positions, D values of a patch, R rank, O units.
"""

import math
from dataclasses import dataclass, field

import torch

OPTIONS = {"num_warps": 8, "num_stages": 2}
# Positions are split until a gradient of the weights has so many programs, which keep a large GPU
# busy; independent of the device, so that sums are, too.
OUTER_PROGRAMS = 512
# Least positions of a split.
MIN_SPAN = 1024


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    """Name in ``fused_kernels``."""
    constants: dict[str, int | str]
    """Its compile-time constants."""
    grid: tuple[int, int, int]
    """Number of programs along each axis."""
    options: dict[str, int] = field(default_factory=OPTIONS.copy)
    """Triton's options of the compilation."""


def launches(
    positions: int, values: int, rank: int, units: int, precision: str
) -> dict[str, Launch]:
    """Plan every launch of a layer, by its purpose; ``precision`` as in :func:`dot_precision`."""

    def mix(depth: int, columns: int, stride_depth: int, stride_columns: int) -> Launch:
        strides = (stride_depth, stride_columns)
        return _mix(positions, depth, columns, units, strides, precision)

    return {
        "forward": _forward(positions, values, rank, units, precision),
        # Of the matrices M_o = A_o^T.
        "grad_rows": mix(rank, values, 1, rank),
        # M_o = A_o.
        "grad_z": mix(values, rank, rank, 1),
        # M_o = G_o.
        "grad_z of norm2": mix(rank, rank, rank, 1),
        "grad_weight": _outer(positions, values, rank, units, precision),
        "grad_weight of norm2": _outer(positions, rank, rank, units, precision),
    }


def _in_two_parts(precision: str) -> bool:
    """Whether programs hold every operand in two parts, so that blocks must be smaller."""
    return precision == "tf32x3"


def _forward(positions: int, values: int, rank: int, units: int, precision: str) -> Launch:
    two_parts = _in_two_parts(precision)
    block_n = 64 if two_parts else 128
    constants: dict[str, int | str] = {
        "D": values,
        "R": rank,
        "UNITS": units,
        "BLOCK_N": block_n,
        "BLOCK_D": _block(values, 32 if two_parts else 64),
        "BLOCK_R": _block(rank, 32 if two_parts else 64),
        "BLOCK_O": 16,
        "PRECISION": precision,
    }
    grid = (math.ceil(positions / block_n), math.ceil(units / 16), 1)
    return Launch("forward_kernel", constants, grid)


def _mix(
    positions: int,
    depth: int,
    columns: int,
    units: int,
    strides: tuple[int, int],
    precision: str,
) -> Launch:
    """Plan a sum over the units of matrices (depth, columns), which lie at ``strides``."""
    block_k = _block(depth, 16 if _in_two_parts(precision) else 64)
    block_c = _block(columns, 64)
    block_n = 128 if min(block_k, block_c) == 64 else 64
    constants: dict[str, int | str] = {
        "K": depth,
        "C": columns,
        "UNITS": units,
        "STRIDE_K": strides[0],
        "STRIDE_C": strides[1],
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_C": block_c,
        "PRECISION": precision,
    }
    grid = (math.ceil(positions / block_n), math.ceil(columns / block_c), 1)
    # Left to itself, ptxas spills in narrow blocks to bring them down to 128 registers, which these
    # kernels do not need.
    limit = {"maxnreg": 255} if block_c < 64 else {}
    return Launch("mix_kernel", constants, grid, OPTIONS | limit)


def _outer(positions: int, height: int, width: int, units: int, precision: str) -> Launch:
    """Plan a sum over the positions of outer products (height, width) for each unit."""
    largest = 64 if _in_two_parts(precision) else 128
    block_d, block_r = _block(height, largest), _block(width, largest)
    constants: dict[str, int | str] = {
        "D": height,
        "R": width,
        "UNITS": units,
        "BLOCK_N": 32,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "PRECISION": precision,
    }
    tiles = math.ceil(height / block_d) * math.ceil(width / block_r)
    splits = max(1, min(math.ceil(OUTER_PROGRAMS / (tiles * units)), positions // MIN_SPAN))
    return Launch("outer_kernel", constants, (tiles, units, splits))


def _block(size: int, largest: int) -> int:
    """Choose a block for ``size``: a power of two from 16 to ``largest``.

    It is the largest that pads ``size`` by at most an eighth, else the one that pads least.
    """
    blocks: list[int] = [2**power for power in range(largest.bit_length() - 1, 3, -1)]
    padded = {block: math.ceil(size / block) * block for block in blocks}
    for block in blocks:
        if 8 * padded[block] <= 9 * size:
            return block
    return min(blocks, key=lambda block: padded[block])


def dot_precision(dtype: torch.dtype) -> str:
    """Decide how products are formed.

    Of fp32 operands by TF32 where torch may use it, else by three TF32 products, which are as
    accurate as fp32. For bf16 operands the answer has no meaning.
    """
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"
