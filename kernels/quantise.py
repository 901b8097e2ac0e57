"""Rows in 8 bits, with a scale for each row.

    scale = max|x| / largest,   values_i = round(x_i / scale)

`largest` is 127 in int8 and 448 in fp8 (e4m3): symmetric, so a product needs no correction for a
zero point. A program holds one row in registers, so the largest magnitude costs no second read.
A NaN in a row becomes its scale: whatever is computed from the row stays NaN. In the condition
cache each head of a row is such a row; its e4m3 is made of bits, since GPUs before 8.9 have no
conversion. `reference.quantise_` and `reference.quantise_cache_` are the specifications.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch


@triton.jit
def store_quantised(b_x, values_ptr, scale_ptr, o_d, m_d, LARGEST: tl.constexpr):
    """Quantises a row, zeros where `m_d` is false, and stores its values and its scale."""
    largest = tl.max(tl.abs(b_x), 0)
    # the reduction above drops NaN
    has_nan = tl.max((b_x != b_x).to(tl.int32), 0) > 0
    largest = tl.where(has_nan, float("nan"), tl.where(largest > 1e-20, largest, 1e-20))
    b_y = b_x * (LARGEST / largest)
    if LARGEST == 127.0:
        b_y = b_y + tl.where(b_y < 0, -0.5, 0.5)  # the conversion truncates
    tl.store(values_ptr + o_d, b_y.to(values_ptr.dtype.element_ty), mask=m_d)
    tl.store(scale_ptr, largest * (1 / LARGEST))


@triton.jit
def quantise_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    stride_x_row,
    stride_values_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < WIDTH
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    values_ptr += i_row * stride_values_row
    store_quantised(b_x, values_ptr, scales_ptr + i_row, o_d, m_d, LARGEST)


def quantise_(
    x: Tensor,  # [rows, width]
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """Launches the quantisation; see `reference.quantise_`.

    Raises:
        TypeError, ValueError: see `contract.quantise_`.
    """
    contract.quantise_(x, values, scales, fused=True)
    rows, width = x.shape
    if rows:
        chosen = launch.choose("quantise_", x)
        quantise_kernel[(rows,)](
            x,
            values,
            scales,
            x.stride(0),
            values.stride(0),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            LARGEST=contract.LARGEST[values.dtype],
            num_warps=chosen.num_warps,
        )


@triton.jit
def _e4m3(b_x):
    """float32 of at most 448 to the bits of e4m3, by way of float16, whose exponents lie 8 higher.

    Rounded to 10 bits of mantissa first, then to nearest even.
    """
    b_bits = (b_x * (1 / 256)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    b_size = b_bits & 0x7FFF
    b_size = (b_size + 63 + ((b_size >> 7) & 1)) >> 7
    return (b_size | ((b_bits >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def _cache_row(
    x_ptr,
    cache_ptr,
    scales_ptr,
    o_h,
    o_d,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Some heads of a row in 8 bits, and their scales."""
    m_h = o_h < KV_HEADS
    m_x = m_h[:, None] & (o_d < HEAD_DIM)[None, :]
    o_x = o_h[:, None] * HEAD_DIM + o_d[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_largest = tl.max(tl.abs(b_x), 1)
    # the reduction above drops NaN
    b_has_nan = tl.max((b_x != b_x).to(tl.int32), 1) > 0
    b_largest = tl.where(b_largest > 1e-20, b_largest, 1e-20)
    b_largest = tl.where(b_has_nan, float("nan"), b_largest)
    b_y = b_x * (LARGEST / b_largest)[:, None]
    if LARGEST == 127.0:
        b_values = (b_y + tl.where(b_y < 0, -0.5, 0.5)).to(tl.int8)  # the conversion truncates
    else:
        b_values = _e4m3(b_y)
    tl.store(cache_ptr + o_x, b_values, mask=m_x)
    tl.store(scales_ptr + o_h, b_largest * (1 / LARGEST), mask=m_h)


@triton.jit
def quantise_cache_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    cache_rows_ptr,
    stride_k_row,
    stride_v_row,
    stride_k_cache_row,
    stride_v_cache_row,
    stride_k_scales_row,
    stride_v_scales_row,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    cache_row = tl.load(cache_rows_ptr + i_row)
    o_h = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_d = tl.arange(0, BLOCK_D)
    k_cache_ptr += cache_row * stride_k_cache_row
    k_scales_ptr += cache_row * stride_k_scales_row
    k_ptr += i_row * stride_k_row
    _cache_row(k_ptr, k_cache_ptr, k_scales_ptr, o_h, o_d, KV_HEADS, HEAD_DIM, LARGEST)
    v_cache_ptr += cache_row * stride_v_cache_row
    v_scales_ptr += cache_row * stride_v_scales_row
    v_ptr += i_row * stride_v_row
    _cache_row(v_ptr, v_cache_ptr, v_scales_ptr, o_h, o_d, KV_HEADS, HEAD_DIM, LARGEST)


def quantise_cache_(
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8, written at `cache_rows`
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache, written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct, inside the cache
) -> None:
    """Launches the cache's quantisation; see `reference.quantise_cache_`.

    Raises:
        TypeError, ValueError: see `contract.quantise_cache_`. The values of `cache_rows` live on
            the device and are not checked.
    """
    contract.quantise_cache_(k, v, k_cache, v_cache, cache_rows, fused=True)
    rows, kv_heads, head_dim = k.shape
    if not rows:
        return
    chosen = launch.choose("quantise_cache_", k)
    block_d = triton.next_power_of_2(head_dim)
    block_heads = min(max(1, chosen.block // block_d), triton.next_power_of_2(kv_heads))
    k_values, k_scales = contract.cache_parts(k_cache, kv_heads, head_dim)
    v_values, v_scales = contract.cache_parts(v_cache, kv_heads, head_dim)
    form = torch.int8 if k_cache.dtype == torch.int8 else torch.float8_e4m3fn
    quantise_cache_kernel[(rows, triton.cdiv(kv_heads, block_heads))](
        k,
        v,
        k_values,
        v_values,
        k_scales,
        v_scales,
        cache_rows,
        k.stride(0),
        v.stride(0),
        k_values.stride(0),
        v_values.stride(0),
        k_scales.stride(0),
        v_scales.stride(0),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_D=block_d,
        LARGEST=contract.LARGEST[form],
        num_warps=chosen.num_warps,
    )
