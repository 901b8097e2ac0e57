"""SwiGLU on the fused gate-up product.

    out_i = gate_i * sigmoid(gate_i) * up_i        (Shazeer, 2020)

Both halves of a row are read where the product left them, without a copy of either. In float32,
rounded once. `reference.swiglu` is the specification.

Where the result is wanted in 8 bits, a program holds a whole row, quantised from the float32 that
is in registers (see `quantise`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch
from .quantise import store_quantised


@triton.jit
def swiglu_kernel(
    gate_up_ptr,
    out_ptr,
    stride_gate_up_row,
    stride_out_row,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < INNER
    p_gate = gate_up_ptr + i_row * stride_gate_up_row + o_d
    b_gate = tl.load(p_gate, mask=m_d, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + INNER, mask=m_d, other=0.0).to(tl.float32)
    b_out = (b_gate * tl.sigmoid(b_gate) * b_up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_row * stride_out_row + o_d, b_out, mask=m_d)


@triton.jit
def swiglu_quantise_kernel(
    gate_up_ptr,
    values_ptr,
    scales_ptr,
    stride_gate_up_row,
    stride_values_row,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < INNER
    p_gate = gate_up_ptr + i_row * stride_gate_up_row + o_d
    b_gate = tl.load(p_gate, mask=m_d, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + INNER, mask=m_d, other=0.0).to(tl.float32)
    b_inner = b_gate * tl.sigmoid(b_gate) * b_up
    values_ptr += i_row * stride_values_row
    store_quantised(b_inner, values_ptr, scales_ptr + i_row, o_d, m_d, LARGEST)


def swiglu(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    out: Tensor | None = None,  # [rows, intermediate]
) -> Tensor:  # [rows, intermediate]
    """Launches the activation; see `reference.swiglu`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.swiglu`.
    """
    contract.swiglu(gate_up, fused=True)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    else:
        contract.same("out", out, gate_up[:, :inner])
    if rows and inner:
        chosen = launch.choose("swiglu", gate_up)
        block = min(chosen.block, triton.next_power_of_2(inner))
        swiglu_kernel[(rows, triton.cdiv(inner, block))](
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            INNER=inner,
            BLOCK=block,
            num_warps=chosen.num_warps,
        )
    return out


def swiglu_quantise_(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    values: Tensor,  # [rows, intermediate], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """Launches the activation; see `reference.swiglu_quantise_`.

    Raises:
        TypeError, ValueError: see `contract.swiglu_quantise_`.
    """
    contract.swiglu_quantise_(gate_up, values, scales, fused=True)
    rows, inner = values.shape
    if rows:
        chosen = launch.choose("swiglu_quantise_", gate_up)
        swiglu_quantise_kernel[(rows,)](
            gate_up,
            values,
            scales,
            gate_up.stride(0),
            values.stride(0),
            INNER=inner,
            BLOCK=triton.next_power_of_2(inner),
            LARGEST=contract.LARGEST[values.dtype],
            num_warps=chosen.num_warps,
        )
