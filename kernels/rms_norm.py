"""RMSNorm, in the dtype of its input or in 8 bits.

    out_i = x_i / sqrt(mean(x^2) + eps) * weight        (Zhang & Sennrich, 2019)

A program holds one row in registers, so it is read once and written once. Sums in float32 (3072
squares overflow float16), rounded once. Products add to the residual stream themselves, so a norm
only reads it. `reference.rms_norm` is the specification.

It can leave its rows in 8 bits instead, quantised from the float32 that is in registers (see
`quantise`): a later product in 8 bits then reads half the bytes, and nothing is rounded twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch
from .quantise import store_quantised


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_x_row,
    stride_out_row,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < HIDDEN
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / HIDDEN + eps)
    b_out = (b_x * scale * b_weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_row * stride_out_row + o_d, b_out, mask=m_d)


@triton.jit
def rms_norm_quantise_kernel(
    x_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    stride_x_row,
    stride_values_row,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < HIDDEN
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / HIDDEN + eps)
    values_ptr += i_row * stride_values_row
    store_quantised(b_x * scale * b_weight, values_ptr, scales_ptr + i_row, o_d, m_d, LARGEST)


def rms_norm(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """Launches the norm; see `reference.rms_norm`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.rms_norm`.
    """
    contract.rms_norm(x, weight, eps, fused=True)
    rows, hidden = x.shape
    if out is None:
        out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    else:
        contract.same("out", out, x)
    if rows:
        chosen = launch.choose("rms_norm", x)
        rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            eps,
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=chosen.num_warps,
        )
    return out


def rms_norm_quantise_(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    values: Tensor,  # [rows, hidden], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """Launches the norm; see `reference.rms_norm_quantise_`.

    Raises:
        TypeError, ValueError: see `contract.rms_norm_quantise_`.
    """
    contract.rms_norm_quantise_(x, weight, eps, values, scales, fused=True)
    rows, hidden = x.shape
    if rows:
        chosen = launch.choose("rms_norm_quantise_", x)
        rms_norm_quantise_kernel[(rows,)](
            x,
            weight,
            values,
            scales,
            x.stride(0),
            values.stride(0),
            eps,
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            LARGEST=contract.LARGEST[values.dtype],
            num_warps=chosen.num_warps,
        )
