"""Matrix product of rows and weights in 8 bits, with the scales of both in its epilogue.

    out_ij = (sum_k values_ik weight_jk) * scales_i * weight_scales_j, or out_ij + that

Products of int8 are summed exactly in int32, those of fp8 in float32. Both operands are contiguous
along k, as the matrix units want them. Neighbouring programs share tiles: columns of tiles are
walked in groups of rows, so that what one program reads, others find in the L2 cache.
`reference.scaled_mm_` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch

_GROUP = 8  # tiles of rows that are walked together
_ADDED = 128  # columns of a tile at most that is added to what is there


@triton.jit
def scaled_mm_kernel(
    values_ptr,
    scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    rows,
    columns,
    stride_values_row,
    stride_weight_row,
    stride_out_row,
    WIDTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # whether the product is added to what is there
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    i_tile = tl.program_id(0)
    first_m = i_tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first_m, GROUP)
    i_m = first_m + i_tile % (GROUP * tiles_n) % group
    i_n = i_tile % (GROUP * tiles_n) // group

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # past the ends, the last row again: plain loads, and what they give is not stored
    o_row = tl.minimum(o_m, rows - 1).to(tl.int64)
    o_column = tl.minimum(o_n, columns - 1).to(tl.int64)
    p_values = values_ptr + o_row[:, None] * stride_values_row + o_k[None, :]
    p_weight = weight_ptr + o_column[:, None] * stride_weight_row + o_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for i_k in range(0, WIDTH // BLOCK_K * BLOCK_K, BLOCK_K):
        b_values = tl.load(p_values + i_k)
        b_weight = tl.load(p_weight + i_k)
        acc = tl.dot(b_values, tl.trans(b_weight), acc, out_dtype=ACCUMULATOR)
    if WIDTH % BLOCK_K:
        first: tl.constexpr = WIDTH // BLOCK_K * BLOCK_K
        m_k = (first + o_k < WIDTH)[None, :]
        b_values = tl.load(p_values + first, mask=m_k, other=0.0)
        b_weight = tl.load(p_weight + first, mask=m_k, other=0.0)
        acc = tl.dot(b_values, tl.trans(b_weight), acc, out_dtype=ACCUMULATOR)

    b_scales = tl.load(scales_ptr + o_row)
    b_weight_scales = tl.load(weight_scales_ptr + o_column)
    b_out = acc.to(tl.float32) * b_scales[:, None] * b_weight_scales[None, :]
    p_out = out_ptr + o_row[:, None] * stride_out_row + o_n[None, :]
    m_out = (o_m < rows)[:, None] & (o_n < columns)[None, :]
    if ACCUMULATE:
        b_out += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


def scaled_mm_(
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn
    scales: Tensor,  # [rows], float32
    weight: Tensor,  # [columns, width], of the dtype of values
    weight_scales: Tensor,  # [columns], float32
    result: Tensor,  # [rows, columns], written
    accumulate: bool = False,  # whether the product is added to what is there
) -> None:
    """Launches the product; see `reference.scaled_mm_`.

    Raises:
        TypeError, ValueError: see `contract.scaled_mm_`.
    """
    contract.scaled_mm_(values, scales, weight, weight_scales, result, accumulate, fused=True)
    (rows, width), columns = values.shape, weight.shape[0]
    if rows and columns:
        chosen = launch.choose("scaled_mm_", values)
        # what it is added to takes registers, too: more than there are beside sums of 256 columns
        block_n = min(chosen.block_n, _ADDED) if accumulate else chosen.block_n
        tiles = triton.cdiv(rows, chosen.block_m) * triton.cdiv(columns, block_n)
        scaled_mm_kernel[(tiles,)](
            values,
            scales,
            weight,
            weight_scales,
            result,
            rows,
            columns,
            values.stride(0),
            weight.stride(0),
            result.stride(0),
            WIDTH=width,
            ACCUMULATOR=tl.int32 if values.dtype == torch.int8 else tl.float32,
            ACCUMULATE=accumulate,
            BLOCK_M=chosen.block_m,
            BLOCK_N=block_n,
            BLOCK_K=chosen.block_k,
            GROUP=_GROUP,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
