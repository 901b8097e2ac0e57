"""Rows in 8 bits, with a scale for each row.

    scale = max|x| / largest,   values_i = round(x_i / scale)

`largest` is 127 in int8 and 448 in fp8 (e4m3): symmetric, so a product needs no correction for a
zero point. A program holds one row in registers, so the largest magnitude costs no second read.
A NaN in a row becomes its scale: whatever is computed from the row stays NaN.
`reference.quantise_` is the specification.
"""

from __future__ import annotations

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
