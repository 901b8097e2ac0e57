"""Weights stored in 8 or 4 bits, expanded ahead of their products.

    weight_ij = value_ij * scale_ig        g = j / 64, or 0 where a row has one scale

Every byte is read once and every result written once; the arithmetic hides behind that. Products
in float32, rounded once. e4m3 is decoded from its bits, since GPUs before 8.9 have no conversion;
nf4's table is a tree of selections. `reference.dequantise_int8_`, `reference.dequantise_nf4_` and
`reference.dequantise_fp8_` are the specifications.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch
from .reference import NF4

# Constants of the table, as Triton wants globals.
_V0, _V1, _V2, _V3, _V4, _V5, _V6, _V7 = (tl.constexpr(value) for value in NF4[:8])
_V8, _V9, _V10, _V11, _V12, _V13, _V14, _V15 = (tl.constexpr(value) for value in NF4[8:])
_GROUP = tl.constexpr(contract.GROUP)


@triton.jit
def dequantise_int8_kernel(
    weight_ptr,
    values_ptr,
    scales_ptr,
    stride_weight_row,
    stride_values_row,
    stride_scales_row,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_g = tl.program_id(1) * (BLOCK // _GROUP) + tl.arange(0, BLOCK // _GROUP)
    o_d = o_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    m_g, m_d = o_g * _GROUP < COLUMNS, o_d < COLUMNS
    b_values = tl.load(values_ptr + i_row * stride_values_row + o_d, mask=m_d, other=0)
    # one for each group: a thread's values share it
    p_scales = scales_ptr + i_row * stride_scales_row + o_g
    b_scales = tl.load(p_scales, mask=m_g, other=0.0).to(tl.float32)
    b_weight = (b_values.to(tl.float32) * b_scales[:, None]).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + i_row * stride_weight_row + o_d, b_weight, mask=m_d)


@triton.jit
def dequantise_fp8_kernel(
    weight_ptr,
    values_ptr,
    scales_ptr,
    stride_weight_row,
    stride_values_row,
    stride_scales_row,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < COLUMNS
    b_bits = tl.load(values_ptr + i_row * stride_values_row + o_d, mask=m_d, other=0).to(tl.int16)
    # sign and the 7 other bits in the places of float16, whose exponents lie 8 higher
    b_bits = ((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)
    b_values = b_bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    scale = tl.load(scales_ptr + i_row * stride_scales_row)
    b_weight = (b_values * scale).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + i_row * stride_weight_row + o_d, b_weight, mask=m_d)


@triton.jit
def _nf4(b_codes):
    m_0, m_1 = (b_codes & 1) != 0, (b_codes & 2) != 0
    b_low = tl.where(m_1, tl.where(m_0, _V3, _V2), tl.where(m_0, _V1, _V0))
    b_next = tl.where(m_1, tl.where(m_0, _V7, _V6), tl.where(m_0, _V5, _V4))
    b_low = tl.where((b_codes & 4) != 0, b_next, b_low)
    b_high = tl.where(m_1, tl.where(m_0, _V11, _V10), tl.where(m_0, _V9, _V8))
    b_next = tl.where(m_1, tl.where(m_0, _V15, _V14), tl.where(m_0, _V13, _V12))
    b_high = tl.where((b_codes & 4) != 0, b_next, b_high)
    return tl.where((b_codes & 8) != 0, b_high, b_low)


@triton.jit
def dequantise_nf4_kernel(
    weight_ptr,
    values_ptr,
    scales_ptr,
    ranges_ptr,
    stride_weight_row,
    stride_values_row,
    stride_scales_row,
    stride_ranges_row,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_g = tl.program_id(1) * (BLOCK // _GROUP) + tl.arange(0, BLOCK // _GROUP)
    o_d = o_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    m_g, m_d = o_g * _GROUP < COLUMNS, o_d < COLUMNS
    o_pair = o_g[:, None] * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, :]
    p_pairs = values_ptr + i_row * stride_values_row + o_pair
    b_pairs = tl.load(p_pairs, mask=m_g[:, None], other=0).to(tl.int32)
    b_values = tl.interleave(_nf4(b_pairs & 15), _nf4(b_pairs >> 4))
    b_codes = tl.load(scales_ptr + i_row * stride_scales_row + o_g, mask=m_g, other=0)
    low = tl.load(ranges_ptr + i_row * stride_ranges_row)
    step = tl.load(ranges_ptr + i_row * stride_ranges_row + 1)
    b_scales = low + b_codes.to(tl.float32) * step
    b_weight = (b_values * b_scales[:, None]).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + i_row * stride_weight_row + o_d, b_weight, mask=m_d)


def dequantise_int8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 64], int8
    scales: Tensor,  # [rows, groups], bfloat16
) -> None:
    """Launches the expansion; see `reference.dequantise_int8_`.

    Raises:
        TypeError, ValueError: see `contract.dequantise_int8_`.
    """
    contract.dequantise_int8_(weight, values, scales, fused=True)
    if weight.numel():
        grid, options = _launch("dequantise_int8_", weight)
        dequantise_int8_kernel[grid](
            weight,
            values,
            scales,
            weight.stride(0),
            values.stride(0),
            scales.stride(0),
            **options,
        )


def dequantise_fp8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, columns], uint8: bits of float8_e4m3fn
    scales: Tensor,  # [rows, 1], float32
) -> None:
    """Launches the expansion; see `reference.dequantise_fp8_`.

    Raises:
        TypeError, ValueError: see `contract.dequantise_fp8_`.
    """
    contract.dequantise_fp8_(weight, values, scales, fused=True)
    if weight.numel():
        grid, options = _launch("dequantise_fp8_", weight)
        dequantise_fp8_kernel[grid](
            weight,
            values,
            scales,
            weight.stride(0),
            values.stride(0),
            scales.stride(0),
            **options,
        )


def dequantise_nf4_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 32], uint8
    scales: Tensor,  # [rows, groups], uint8
    ranges: Tensor,  # [rows, 2], float32
) -> None:
    """Launches the expansion; see `reference.dequantise_nf4_`.

    Raises:
        TypeError, ValueError: see `contract.dequantise_nf4_`.
    """
    contract.dequantise_nf4_(weight, values, scales, ranges, fused=True)
    if weight.numel():
        grid, options = _launch("dequantise_nf4_", weight)
        dequantise_nf4_kernel[grid](
            weight,
            values,
            scales,
            ranges,
            weight.stride(0),
            values.stride(0),
            scales.stride(0),
            ranges.stride(0),
            **options,
        )


def _launch(name: str, weight: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel: a program for each block of a row."""
    rows, columns = weight.shape
    chosen = launch.choose(name, weight)
    block = max(contract.GROUP, min(chosen.block, triton.next_power_of_2(columns)))
    grid = rows, triton.cdiv(columns, block)
    return grid, {"COLUMNS": columns, "BLOCK": block, "num_warps": chosen.num_warps}
