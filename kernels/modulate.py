"""The output layer's LayerNorm without weights, scaled and shifted.

    out_i = (x_i - mean(x)) / sqrt(var(x) + eps) * (1 + scale_i) + shift_i   (Peebles & Xie, 2022)

Shift and scale are rows of the tables of all steps; which step each group of rows takes is read on
the device, so that a captured launch serves them all. A program holds one row in registers: read
once, written once. The variance is of the centred row, in float32, since the mean of squares less
the squared mean cancels. `reference.modulate` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch


@triton.jit(do_not_specialize=["rows_per_group"])
def modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    step_ptr,
    out_ptr,
    stride_x_row,
    stride_shift_row,
    stride_scale_row,
    stride_out_row,
    rows_per_group,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_step = tl.load(step_ptr + i_row // rows_per_group)
    i_row = i_row.to(tl.int64)
    shift_ptr += i_step * stride_shift_row
    scale_ptr += i_step * stride_scale_row
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < HIDDEN
    b_x = tl.load(x_ptr + i_row * stride_x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = tl.where(m_d, b_x - tl.sum(b_x, 0) / HIDDEN, 0.0)
    norm = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / HIDDEN + eps)
    b_out = (b_x * norm * (1.0 + b_scale) + b_shift).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_row * stride_out_row + o_d, b_out, mask=m_d)


def modulate(
    x: Tensor,  # [rows, hidden]: equal groups of rows, one after the other
    shift: Tensor,  # [steps, hidden]
    scale: Tensor,  # [steps, hidden]
    step: Tensor,  # [groups], int64: the row of both that each group takes
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """Launches norm and modulation; see `reference.modulate`.

    Args:
        out: written and returned where given, else allocated; may be x.

    Raises:
        TypeError, ValueError: see `contract.modulate`.
    """
    contract.modulate(x, shift, scale, step, eps, fused=True)
    rows, hidden = x.shape
    if out is None:
        out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    else:
        contract.same("out", out, x)
    if rows:
        chosen = launch.choose("modulate", x)
        modulate_kernel[(rows,)](
            x,
            shift,
            scale,
            step,
            out,
            x.stride(0),
            shift.stride(0),
            scale.stride(0),
            out.stride(0),
            rows // step.shape[0],
            eps,
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=chosen.num_warps,
        )
    return out
