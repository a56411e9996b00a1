"""Triton kernels of the Dynamic Alignment Unit; ``fused`` launches them and says what each is for.

No kernel forms a dynamic weight outside of registers, and none uses atomics: the same inputs give
the same bits. Shapes are compile-time constants except the number of positions. Blocks are powers
of two and may reach over the edge of any shape: loads there give 0, which adds nothing.

Legend, also of the suffixes: N positions, D values of a patch, R rank, O units. In a kernel n, i,
j, o index a block of them.
"""
# Names carry their shapes, and constants of the compilation are upper case.
# ruff: noqa: N803, N806
# Triton reads annotations of its own, and does not type its decorator.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    rows, z, weight, bias, dot, norm2, positions,
    D: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dot and norm2 (O, N) of a block of units at a block of positions.

    w_o = A_o z + b_o is formed in blocks of (N, D).

    rows (N, D), z (N, R), weight (O, D, R), bias (O, D) or None, norm2 None if not wanted. Squares
    are summed over w itself, hence exact also where z lies in a weak direction of A_o. A block of x
    serves all units of the program.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # N * D may exceed 2^31.
    n_64 = n.to(tl.int64)
    first_unit = tl.program_id(1) * BLOCK_O
    o = tl.arange(0, BLOCK_O)
    dot_NO = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    norm2_NO = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, D, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        x_ND = tl.load(
            rows + n_64[:, None] * D + i[None, :],
            mask=(n < positions)[:, None] & (i < D)[None, :],
            other=0.0,
        )
        x_ND = x_ND.to(tl.float32)
        for unit in range(tl.minimum(BLOCK_O, UNITS - first_unit)):
            row = (first_unit + unit).to(tl.int64) * D + i
            w_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for first_j in range(0, R, BLOCK_R):
                j = first_j + tl.arange(0, BLOCK_R)
                z_NR = tl.load(
                    z + n_64[:, None] * R + j[None, :],
                    mask=(n < positions)[:, None] & (j < R)[None, :],
                    other=0.0,
                )
                a_RD = tl.load(
                    weight + row[None, :] * R + j[:, None],
                    mask=(i < D)[None, :] & (j < R)[:, None],
                    other=0.0,
                )
                w_ND = tl.dot(z_NR, a_RD, w_ND, input_precision=PRECISION)
            if bias is not None:
                w_ND += tl.load(bias + row, mask=i < D, other=0.0).to(tl.float32)[None, :]
            here = (o == unit)[None, :]
            dot_NO += tl.where(here, tl.sum(w_ND * x_ND, 1)[:, None], 0.0)
            if norm2 is not None:
                norm2_NO += tl.where(here, tl.sum(w_ND * w_ND, 1)[:, None], 0.0)
    units = first_unit + o
    at = units.to(tl.int64)[None, :] * positions + n_64[:, None]
    valid = (n < positions)[:, None] & (units < UNITS)[None, :]
    tl.store(dot + at, dot_NO, mask=valid)
    if norm2 is not None:
        tl.store(norm2 + at, norm2_NO, mask=valid)


@triton.jit
def mix_kernel(
    left, scale, matrices, out, positions,
    K: tl.constexpr, C: tl.constexpr, UNITS: tl.constexpr,
    STRIDE_K: tl.constexpr, STRIDE_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sum_o scale_on left_n M_o to out_n, for a block of positions and of the C columns.

    It is one matrix product of depth O * K.

    left (N, K), scale (O, N) fp32, matrices (O, K, C) with strides K * C, STRIDE_K, STRIDE_C, out
    (N, C) fp32. A block of left stays in registers while the matrices of all units pass by.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_64 = n.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = out + n_64[:, None] * C + c[None, :]
    valid = (n < positions)[:, None] & (c < C)[None, :]
    out_NC = tl.load(place, mask=valid, other=0.0)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left_NK = tl.load(
            left + n_64[:, None] * K + k[None, :],
            mask=(n < positions)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        block = matrices + k[:, None] * STRIDE_K + c[None, :] * STRIDE_C
        for unit in range(UNITS):
            unit_64 = tl.cast(unit, tl.int64)
            scale_N = tl.load(scale + unit_64 * positions + n, mask=n < positions, other=0.0)
            m_KC = tl.load(
                block + unit_64 * (K * C), mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
            )
            scaled_NK = (left_NK * scale_N[:, None]).to(left_NK.dtype)
            out_NC = tl.dot(scaled_NK, m_KC, out_NC, input_precision=PRECISION)
    tl.store(place, out_NC, mask=valid)


@triton.jit
def outer_kernel(
    rows, z, scale, out, positions, span,
    D: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out_s,o = sum_n scale_on rows_n z_n^T for one unit and a block of (D, R).

    The sum is over the s-th ``span`` of positions.

    rows (N, D), z (N, R), scale (O, N) fp32, out (splits, O, D, R) fp32. The splits are summed
    afterwards, in fixed order.
    """
    blocks_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    i = tl.program_id(0) // blocks_R * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.program_id(0) % blocks_R * BLOCK_R + tl.arange(0, BLOCK_R)
    unit = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, positions)
    out_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_64 = n.to(tl.int64)
        rows_DN = tl.load(
            rows + n_64[None, :] * D + i[:, None],
            mask=(n < end)[None, :] & (i < D)[:, None],
            other=0.0,
        )
        z_NR = tl.load(
            z + n_64[:, None] * R + j[None, :],
            mask=(n < end)[:, None] & (j < R)[None, :],
            other=0.0,
        )
        scale_N = tl.load(scale + unit * positions + n, mask=n < end, other=0.0)
        scaled_NR = (z_NR * scale_N[:, None]).to(z_NR.dtype)
        out_DR = tl.dot(rows_DN, scaled_NR, out_DR, input_precision=PRECISION)
    split_unit = tl.program_id(2) * UNITS + unit
    place = out + split_unit * (D * R) + i[:, None] * R + j[None, :]
    tl.store(place, out_DR, mask=(i < D)[:, None] & (j < R)[None, :])
