"""Joins the attention of two key segments: what libraries compute of each into that of both.

    out = (exp(a_lse) a + exp(b_lse) b) / (exp(a_lse) + exp(b_lse))

with the log-sum-exp of each segment's scaled scores (Milakov & Gimelshein, 2018), the larger of the
two taken off both before the exponentials, in float32, rounded once. A segment without keys has an
infinite log-sum-exp, negative or, as FlashAttention 2 writes it, positive; its values count
nothing, whatever they are. A program takes some (row, head) pairs. `reference.join_segments` is the
specification.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch
from .attention import output_of


@triton.jit
def join_segments_kernel(
    a_ptr,
    a_lse_ptr,
    b_ptr,
    b_lse_ptr,
    out_ptr,
    stride_a_row,
    stride_a_head,
    stride_a_lse_row,
    stride_a_lse_head,
    stride_b_row,
    stride_b_head,
    stride_b_lse_row,
    stride_b_lse_head,
    stride_out_row,
    pairs,
    heads,
    HEAD: tl.constexpr,
    COLUMNS: tl.constexpr,  # HEAD, or the power of two above it
    BLOCK: tl.constexpr,  # pairs
):
    o_pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_pair = o_pair < pairs
    # int64: a row's place times its stride may pass 2^31
    o_row, o_head = (o_pair // heads).to(tl.int64), o_pair % heads
    o_column = tl.arange(0, COLUMNS)[None, :]
    m = m_pair[:, None] & (o_column < HEAD)

    p_a_lse = a_lse_ptr + o_row * stride_a_lse_row + o_head * stride_a_lse_head
    p_b_lse = b_lse_ptr + o_row * stride_b_lse_row + o_head * stride_b_lse_head
    b_a_lse = tl.load(p_a_lse, mask=m_pair, other=float("-inf"))
    b_b_lse = tl.load(p_b_lse, mask=m_pair, other=float("-inf"))
    b_a_lse = tl.where(b_a_lse == float("inf"), float("-inf"), b_a_lse)
    b_b_lse = tl.where(b_b_lse == float("inf"), float("-inf"), b_b_lse)
    b_top = tl.maximum(b_a_lse, b_b_lse)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_a_share, b_b_share = tl.exp(b_a_lse - b_top), tl.exp(b_b_lse - b_top)
    b_sum = b_a_share + b_b_share
    b_scale = tl.where(b_sum == 0.0, 0.0, 1.0 / b_sum)
    b_a_share, b_b_share = (b_a_share * b_scale)[:, None], (b_b_share * b_scale)[:, None]

    p_a = a_ptr + (o_row * stride_a_row + o_head * stride_a_head)[:, None] + o_column
    p_b = b_ptr + (o_row * stride_b_row + o_head * stride_b_head)[:, None] + o_column
    b_a = tl.load(p_a, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=m, other=0.0).to(tl.float32)
    # chosen, not multiplied: nothing times NaN is NaN
    b_a = tl.where(b_a_share == 0.0, 0.0, b_a * b_a_share)
    b_b = tl.where(b_b_share == 0.0, 0.0, b_b * b_b_share)
    p_out = out_ptr + (o_row * stride_out_row + o_head * HEAD)[:, None] + o_column
    tl.store(p_out, (b_a + b_b).to(out_ptr.dtype.element_ty), mask=m)


def join_segments(
    a: Tensor,  # [rows, heads, head_dim]
    a_lse: Tensor,  # [rows, heads], float32
    b: Tensor,  # [rows, heads, head_dim]
    b_lse: Tensor,  # [rows, heads], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Launches the join; see `reference.join_segments`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.join_segments`.
    """
    contract.join_segments(a, a_lse, b, b_lse, fused=True)
    out = output_of(a, out)
    rows, heads, head_dim = a.shape
    if not out.numel():
        return out
    chosen = launch.choose("join_segments", a)
    join_segments_kernel[(triton.cdiv(rows * heads, chosen.block),)](
        a,
        a_lse,
        b,
        b_lse,
        out,
        a.stride(0),
        a.stride(1),
        a_lse.stride(0),
        a_lse.stride(1),
        b.stride(0),
        b.stride(1),
        b_lse.stride(0),
        b_lse.stride(1),
        out.stride(0),
        rows * heads,
        heads,
        HEAD=head_dim,
        COLUMNS=triton.next_power_of_2(head_dim),
        BLOCK=chosen.block,
        num_warps=chosen.num_warps,
    )
    return out
