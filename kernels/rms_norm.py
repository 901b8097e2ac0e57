"""RMSNorm, alone and after the residual update.

    out_i = x_i / sqrt(mean(x^2) + eps) * weight        (Zhang & Sennrich, 2019)

A program holds one row in registers, so it is read once and written once. With the residual update
an element costs 4 accesses (both read, both written); an addition and a norm apart cost 5, so in
bfloat16 fusing saves 2 * hidden bytes a row. Sums in float32 (3072 squares overflow float16),
rounded once. `reference.rms_norm` and `reference.add_rms_norm` are the specifications.

Either can leave its rows in 8 bits instead, quantised from the float32 that is in registers (see
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
def add_rms_norm_kernel(
    residual_ptr,
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_residual_row,
    stride_x_row,
    stride_out_row,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < HIDDEN
    p_residual = residual_ptr + i_row * stride_residual_row + o_d
    b_residual = tl.load(p_residual, mask=m_d, other=0.0).to(tl.float32)
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    # the norm is of the sum as it is kept, so of the rounded one
    b_sum = (b_residual + b_x).to(residual_ptr.dtype.element_ty)
    tl.store(p_residual, b_sum, mask=m_d)
    b_sum = b_sum.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_sum * b_sum, 0) / HIDDEN + eps)
    b_out = (b_sum * scale * b_weight).to(out_ptr.dtype.element_ty)
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


@triton.jit
def add_rms_norm_quantise_kernel(
    residual_ptr,
    x_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    stride_residual_row,
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
    p_residual = residual_ptr + i_row * stride_residual_row + o_d
    b_residual = tl.load(p_residual, mask=m_d, other=0.0).to(tl.float32)
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sum = (b_residual + b_x).to(residual_ptr.dtype.element_ty)
    tl.store(p_residual, b_sum, mask=m_d)
    b_sum = b_sum.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_sum * b_sum, 0) / HIDDEN + eps)
    values_ptr += i_row * stride_values_row
    store_quantised(b_sum * scale * b_weight, values_ptr, scales_ptr + i_row, o_d, m_d, LARGEST)


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


def add_rms_norm(
    residual: Tensor,  # [rows, hidden], updated in place
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """Launches the residual update and the norm; see `reference.add_rms_norm`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.add_rms_norm`.
    """
    contract.add_rms_norm(residual, x, weight, eps, fused=True)
    rows, hidden = x.shape
    if out is None:
        out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    else:
        contract.same("out", out, x)
    if rows:
        chosen = launch.choose("add_rms_norm", x)
        add_rms_norm_kernel[(rows,)](
            residual,
            x,
            weight,
            out,
            residual.stride(0),
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


def add_rms_norm_quantise_(
    residual: Tensor,  # [rows, hidden], updated in place
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    values: Tensor,  # [rows, hidden], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """Launches the residual update and the norm; see `reference.add_rms_norm_quantise_`.

    Raises:
        TypeError, ValueError: see `contract.add_rms_norm_quantise_`.
    """
    contract.add_rms_norm_quantise_(residual, x, weight, eps, values, scales, fused=True)
    rows, hidden = x.shape
    if rows:
        chosen = launch.choose("add_rms_norm_quantise_", x)
        add_rms_norm_quantise_kernel[(rows,)](
            residual,
            x,
            weight,
            values,
            scales,
            residual.stride(0),
            x.stride(0),
            values.stride(0),
            eps,
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            LARGEST=contract.LARGEST[values.dtype],
            num_warps=chosen.num_warps,
        )
