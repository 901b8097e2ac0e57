"""Softmax attention of a step over a condition cache in 8 bits.

    out_i = sum_j softmax_j(s_ij) v_j,  s_ij = q_i . k_j / sqrt(head_dim),  k_j = scale_j values_j

as in `attention`, with the scales of the cached rows outside both products: of keys on the scores,
of values on the probabilities, both in float32. Values in 8 bits are exact in every dtype of the
queries, so nothing is rounded that a cache in that dtype would not round. e4m3 is decoded from its
bits. `reference.attention_step_8bit` is the specification.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch
from .attention import PARTS, fold, load, load_queries, output_of, scores, store, tails


@triton.jit
def _widened(b_x, like, E4M3: tl.constexpr):
    """Values in 8 bits in the dtype of `like`; those of e4m3 in units of 256."""
    if E4M3:
        b_bits = b_x.to(tl.int16)
        # sign and the 7 other bits in the places of float16, whose exponents lie 8 higher
        b_bits = ((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)
        b_wide = b_bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # 2^23 + 128 + x, made of bits: conversions of integers take the pipe of the exponentials
        b_bits = (b_x.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x80) | 0x4B000000
        b_wide = b_bits.to(tl.float32, bitcast=True) - 8388736.0
    return b_wide.to(like.dtype)


@triton.jit
def attention_step_8bit_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    cu_rows_ptr,
    cu_keys_ptr,  # None where keys are those of the rows
    cache_start_ptr,
    cache_len_ptr,
    cos_ptr,  # None where queries are rotated already
    sin_ptr,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_k_cache_row,
    stride_v_cache_row,
    stride_k_scales_row,
    stride_v_scales_row,
    stride_out_row,
    stride_cos_row,
    stride_sin_row,
    scale,  # log2(e) / sqrt(head_dim)
    unit,  # of the cached values
    SHARE: tl.constexpr,  # query heads per key head
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    E4M3: tl.constexpr,  # whether the cache holds the bits of e4m3, or int8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_tile, i_head, i_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_rows_ptr + i_group)
    rows = tl.load(cu_rows_ptr + i_group + 1) - first
    if i_tile * BLOCK_M >= rows:
        return
    first_key, keys = first, rows
    if cu_keys_ptr is not None:
        first_key = tl.load(cu_keys_ptr + i_group)
        keys = tl.load(cu_keys_ptr + i_group + 1) - first_key
    cached_first = tl.load(cache_start_ptr + i_group)
    cached = tl.load(cache_len_ptr + i_group)

    # int64 only here: a row's place times its stride may pass 2^31, offsets in a group do not
    i_k_head = i_head // SHARE
    o_q_head = i_head * (HEAD_A + HEAD_B)
    o_k_head = i_k_head * (HEAD_A + HEAD_B)
    q_ptr += first.to(tl.int64) * stride_q_row + o_q_head
    out_ptr += first.to(tl.int64) * stride_out_row + o_q_head
    k_ptr += first_key.to(tl.int64) * stride_k_row + o_k_head
    v_ptr += first_key.to(tl.int64) * stride_v_row + o_k_head
    k_cache_ptr += cached_first.to(tl.int64) * stride_k_cache_row + o_k_head
    v_cache_ptr += cached_first.to(tl.int64) * stride_v_cache_row + o_k_head
    k_scales_ptr += cached_first.to(tl.int64) * stride_k_scales_row + i_k_head
    v_scales_ptr += cached_first.to(tl.int64) * stride_v_scales_row + i_k_head

    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    q_a, q_b = load_queries(
        q_ptr, cos_ptr, sin_ptr, first, o_m, m_m, stride_q_row, stride_cos_row, stride_sin_row,
        HEAD_A, HEAD_B,
    )  # fmt: skip

    acc_a = tl.zeros([BLOCK_M, HEAD_A], tl.float32)
    acc_b = acc_a
    if HEAD_B:
        acc_b = tl.zeros([BLOCK_M, HEAD_B], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    # In a cut block the last row is repeated past the end, without a score.
    for i_block in range(tl.cdiv(cached, BLOCK_N)):
        o_row = i_block * BLOCK_N + o_n
        m_n = o_row < cached
        o_row = tl.minimum(o_row, cached - 1)
        k_a, k_b = load(k_cache_ptr, o_row, stride_k_cache_row, HEAD_A, HEAD_B)
        b_k_scale = tl.load(k_scales_ptr + o_row * stride_k_scales_row) * unit
        b_s = scores(q_a, q_b, _widened(k_a, q_a, E4M3), _widened(k_b, q_a, E4M3), HEAD_B)
        b_s = tl.where(m_n[None, :], b_s * b_k_scale[None, :], float("-inf"))
        v_a, v_b = load(v_cache_ptr, o_row, stride_v_cache_row, HEAD_A, HEAD_B)
        b_v_scale = tl.load(v_scales_ptr + o_row * stride_v_scales_row) * unit
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_shrink = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_s * scale - b_new_max[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_max = b_new_max
        b_p = (b_p * b_v_scale[None, :]).to(q_a.dtype)
        v_a = _widened(v_a, q_a, E4M3)
        acc_a = tl.dot(b_p, v_a, acc_a * b_shrink[:, None], input_precision="ieee")
        if HEAD_B:
            v_b = _widened(v_b, q_a, E4M3)
            acc_b = tl.dot(b_p, v_b, acc_b * b_shrink[:, None], input_precision="ieee")

    for i_block in range(keys // BLOCK_N):
        o_row = i_block * BLOCK_N + o_n
        k_a, k_b = load(k_ptr, o_row, stride_k_row, HEAD_A, HEAD_B)
        b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
        v_a, v_b = load(v_ptr, o_row, stride_v_row, HEAD_A, HEAD_B)
        acc_a, acc_b, b_max, b_sum = fold(b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B)
    # of an empty second segment: the cache's own rows are all folded in
    acc_a, acc_b, b_max, b_sum = tails(
        q_a, q_b, acc_a, acc_b, b_max, b_sum, scale,
        k_ptr, v_ptr, stride_k_row, stride_v_row, keys,
        k_ptr, v_ptr, stride_k_row, stride_v_row, 0,
        HEAD_A, HEAD_B, BLOCK_N,
    )  # fmt: skip
    b_scale = 1.0 / b_sum[:, None]
    acc_a = (acc_a * b_scale).to(out_ptr.dtype.element_ty)
    acc_b = (acc_b * b_scale).to(out_ptr.dtype.element_ty)
    store(out_ptr, o_m, m_m, stride_out_row, acc_a, acc_b, HEAD_A, HEAD_B)


def attention_step_8bit(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache
    cu_rows: Tensor,  # [groups + 1], int32
    cache_start: Tensor,  # [groups], int32
    cache_len: Tensor,  # [groups], int32
    max_rows: int,
    cu_keys: Tensor | None = None,  # [groups + 1], int32
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Launches the step's attention; see `reference.attention_step_8bit`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.attention_step_8bit`.
    """
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin
    contract.attention_step_8bit(q, k, v, k_cache, v_cache, *places, fused=True)
    out = output_of(q, out)
    groups = cu_rows.shape[0] - 1
    if not q.shape[0] or not groups:
        return out
    heads, head_dim = q.shape[1:]
    head_a, head_b = PARTS[head_dim]
    chosen = launch.choose("attention_step_8bit", q, head_dim)
    k_values, k_scales = contract.cache_parts(k_cache, k.shape[1], head_dim)
    v_values, v_scales = contract.cache_parts(v_cache, k.shape[1], head_dim)
    is_e4m3 = k_cache.dtype == torch.uint8
    attention_step_8bit_kernel[(triton.cdiv(max_rows, chosen.block_m), heads, groups)](
        q,
        k,
        v,
        k_values,
        v_values,
        k_scales,
        v_scales,
        out,
        cu_rows,
        cu_keys,
        cache_start,
        cache_len,
        cos,
        sin,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k_values.stride(0),
        v_values.stride(0),
        k_scales.stride(0),
        v_scales.stride(0),
        out.stride(0),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        256.0 if is_e4m3 else 1.0,
        SHARE=heads // k.shape[1],
        HEAD_A=head_a,
        HEAD_B=head_b,
        E4M3=is_e4m3,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out
