"""Softmax attention without masks in memory: of a step over two key segments, and of the prefill.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j

computed block by block with a running maximum and sum (online softmax: Milakov & Gimelshein, 2018;
tiling: Dao et al., 2022), in float32, rounded once. Query head h reads key head
`h // (heads / kv_heads)`. A head of 96 is worked on as 64 + 32: padded to 128, a third of the
matrix work would be spent on zeros. `reference.attention_step` and `reference.attention_prefill`
are the specifications.

Groups of different lengths share a launch: the grid is (tiles of the longest group, heads, groups),
and tiles past a group's end return at once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import contract, launch

# The largest powers of two that a head is made of.
PARTS = {64: (64, 0), 96: (64, 32), 128: (128, 0)}


@triton.jit
def scores(q_a, q_b, k_a, k_b, HEAD_B: tl.constexpr):
    """Products of a tile of queries and a block of keys."""
    b_s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if HEAD_B:
        b_s = tl.dot(q_b, tl.trans(k_b), b_s, input_precision="ieee")
    return b_s


@triton.jit
def fold(b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B: tl.constexpr):
    """Takes a block of scores and its values into the running softmax."""
    b_top = tl.max(b_s, 1)
    return _fold_below(b_s, b_top, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B)


@triton.jit
def _fold_below(b_s, b_top, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B: tl.constexpr):
    """As `fold`, where the largest score of each row is known.

    The maximum is kept scaled, the scores are not: scaling and subtracting are then one FMA.
    """
    b_new_max = tl.maximum(b_max, b_top * scale)
    b_shrink = tl.exp2(b_max - b_new_max)
    b_p = tl.exp2(b_s * scale - b_new_max[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_p = b_p.to(v_a.dtype)
    acc_a = tl.dot(b_p, v_a, acc_a * b_shrink[:, None], input_precision="ieee")
    if HEAD_B:
        acc_b = tl.dot(b_p, v_b, acc_b * b_shrink[:, None], input_precision="ieee")
    return acc_a, acc_b, b_new_max, b_sum


@triton.jit
def load(ptr, o_row, stride_row, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    """Rows of one head, in its two parts; the second is unused where HEAD_B is 0."""
    p_row = ptr + o_row[:, None] * stride_row
    b_a = tl.load(p_row + tl.arange(0, HEAD_A)[None, :])
    b_b = b_a
    if HEAD_B:
        b_b = tl.load(p_row + HEAD_A + tl.arange(0, HEAD_B)[None, :])
    return b_a, b_b


@triton.jit
def load_some(ptr, o_row, m_row, stride_row, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    """As `load`, zeros where `m_row` is false."""
    p_row = ptr + o_row[:, None] * stride_row
    b_a = tl.load(p_row + tl.arange(0, HEAD_A)[None, :], mask=m_row[:, None], other=0.0)
    b_b = b_a
    if HEAD_B:
        p_b = p_row + HEAD_A + tl.arange(0, HEAD_B)[None, :]
        b_b = tl.load(p_b, mask=m_row[:, None], other=0.0)
    return b_a, b_b


@triton.jit
def _rotated(
    q_ptr,
    cos_ptr,
    sin_ptr,
    first,
    o_row,
    m_row,
    stride_q_row,
    stride_cos_row,
    stride_sin_row,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
):
    """Features FIRST to FIRST + WIDTH of queries of one head, as `rope_` would leave them."""
    o_d = FIRST + tl.arange(0, WIDTH)
    is_low = o_d < HALF
    # HALF and FIRST are multiples of 16: so are the places where neighbours stop being neighbours
    o_angle = tl.max_contiguous(tl.multiple_of(tl.where(is_low, o_d, o_d - HALF), 16), 16)
    o_other = tl.max_contiguous(tl.multiple_of(tl.where(is_low, o_d + HALF, o_d - HALF), 16), 16)
    m_row = m_row[:, None]
    p_q = q_ptr + o_row[:, None] * stride_q_row
    p_cos = cos_ptr + o_row[:, None] * stride_cos_row + o_angle[None, :]
    p_sin = sin_ptr + o_row[:, None] * stride_sin_row + o_angle[None, :]
    b_q = tl.load(p_q + o_d[None, :], mask=m_row, other=0.0).to(tl.float32)
    b_q *= tl.load(p_cos, mask=m_row, other=0.0)
    tl.debug_barrier()  # or all four blocks are loaded at once, into more registers than there are
    b_other = tl.load(p_q + o_other[None, :], mask=m_row, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_row, other=0.0)
    b_q += b_other * tl.where(is_low[None, :], -b_sin, b_sin)
    b_q = b_q.to(q_ptr.dtype.element_ty)
    # A load that loads nothing, since no row is below 0: what comes from a load, Triton lets the
    # products of Hopper read from shared memory, and all else from registers that every turn fills.
    return tl.load(p_q + o_d[None, :], mask=first < 0, other=b_q)


@triton.jit
def load_queries(
    q_ptr,
    cos_ptr,  # None where queries are rotated already
    sin_ptr,
    first,
    o_row,
    m_row,
    stride_q_row,
    stride_cos_row,
    stride_sin_row,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
):
    """As `load_some`, rotated; `first` is the row of cosines and sines of the group's first."""
    if cos_ptr is None:
        q_a, q_b = load_some(q_ptr, o_row, m_row, stride_q_row, HEAD_A, HEAD_B)
    else:
        half: tl.constexpr = (HEAD_A + HEAD_B) // 2
        cos_ptr += first.to(tl.int64) * stride_cos_row
        sin_ptr += first.to(tl.int64) * stride_sin_row
        q_a = _rotated(
            q_ptr, cos_ptr, sin_ptr, first, o_row, m_row, stride_q_row, stride_cos_row,
            stride_sin_row, 0, HEAD_A, half,
        )  # fmt: skip
        q_b = q_a
        if HEAD_B:
            q_b = _rotated(
                q_ptr, cos_ptr, sin_ptr, first, o_row, m_row, stride_q_row, stride_cos_row,
                stride_sin_row, HEAD_A, HEAD_B, half,
            )  # fmt: skip
    return q_a, q_b


@triton.jit
def store(ptr, o_row, m_row, stride_row, b_a, b_b, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    p_row = ptr + o_row[:, None] * stride_row
    tl.store(p_row + tl.arange(0, HEAD_A)[None, :], b_a, mask=m_row[:, None])
    if HEAD_B:
        p_b = p_row + HEAD_A + tl.arange(0, HEAD_B)[None, :]
        tl.store(p_b, b_b, mask=m_row[:, None])


@triton.jit
def tails(
    q_a,
    q_b,
    acc_a,
    acc_b,
    b_max,
    b_sum,
    scale,
    k_ptr,
    v_ptr,
    stride_k_row,
    stride_v_row,
    rows,
    k_cache_ptr,
    v_cache_ptr,
    stride_k_cache_row,
    stride_v_cache_row,
    cached,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What the whole blocks leave of either segment: the only blocks whose columns are masked.

    A segment without a remainder adds no iteration, so every block has a visible key and the
    maximum stays finite.
    """
    o_n = tl.arange(0, BLOCK_N)
    cache_tail = cached % BLOCK_N
    own_tail = rows % BLOCK_N
    from_cache = (cache_tail > 0).to(tl.int32)
    for i_tail in tl.range(0, from_cache + (own_tail > 0).to(tl.int32), num_stages=1):
        in_cache = i_tail < from_cache
        tail = tl.where(in_cache, cache_tail, own_tail)
        o_row = tl.where(in_cache, cached, rows) - tail + o_n
        p_k = tl.where(in_cache, k_cache_ptr, k_ptr)
        p_v = tl.where(in_cache, v_cache_ptr, v_ptr)
        stride_k = tl.where(in_cache, stride_k_cache_row, stride_k_row)
        stride_v = tl.where(in_cache, stride_v_cache_row, stride_v_row)
        m_n = o_n < tail
        k_a, k_b = load_some(p_k, o_row, m_n, stride_k, HEAD_A, HEAD_B)
        b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        v_a, v_b = load_some(p_v, o_row, m_n, stride_v, HEAD_A, HEAD_B)
        acc_a, acc_b, b_max, b_sum = fold(b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B)
    return acc_a, acc_b, b_max, b_sum


@triton.jit
def attention_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    stride_out_row,
    stride_cos_row,
    stride_sin_row,
    scale,  # log2(e) / sqrt(head_dim)
    SHARE: tl.constexpr,  # query heads per key head
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
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
    o_q_head = i_head * (HEAD_A + HEAD_B)
    o_k_head = (i_head // SHARE) * (HEAD_A + HEAD_B)
    q_ptr += first.to(tl.int64) * stride_q_row + o_q_head
    out_ptr += first.to(tl.int64) * stride_out_row + o_q_head
    k_ptr += first_key.to(tl.int64) * stride_k_row + o_k_head
    v_ptr += first_key.to(tl.int64) * stride_v_row + o_k_head
    k_cache_ptr += cached_first.to(tl.int64) * stride_k_cache_row + o_k_head
    v_cache_ptr += cached_first.to(tl.int64) * stride_v_cache_row + o_k_head

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

    # One loop over the blocks of both segments, cut ones last: where a block lies is chosen per
    # block, so the pipeline of loads fills once, and neither segment is copied beside the other.
    # In a cut block the segment's last row is repeated past its end, without a score. A segment
    # without a remainder adds no block, so every block has a visible key and the maximum stays
    # finite.
    cached_blocks, own_blocks = cached // BLOCK_N, keys // BLOCK_N
    whole_blocks = cached_blocks + own_blocks
    cut_from_cache = (cached % BLOCK_N > 0).to(tl.int32)
    cut_from_own = (keys % BLOCK_N > 0).to(tl.int32)
    for i_block in range(whole_blocks + cut_from_cache + cut_from_own):
        is_cut = i_block >= whole_blocks
        in_cache = i_block < tl.where(is_cut, whole_blocks + cut_from_cache, cached_blocks)
        end = tl.where(in_cache, cached, keys)
        i_whole = tl.where(in_cache, i_block, i_block - cached_blocks)
        i_cut = tl.where(in_cache, cached_blocks, own_blocks)
        o_row = tl.where(is_cut, i_cut, i_whole) * BLOCK_N + o_n
        if is_cut:
            o_row = tl.minimum(o_row, end - 1)
        p_k = tl.where(in_cache, k_cache_ptr, k_ptr)
        p_v = tl.where(in_cache, v_cache_ptr, v_ptr)
        stride_k = tl.where(in_cache, stride_k_cache_row, stride_k_row)
        stride_v = tl.where(in_cache, stride_v_cache_row, stride_v_row)
        k_a, k_b = load(p_k, o_row, stride_k, HEAD_A, HEAD_B)
        b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
        # Before the mask, since repeated rows don't raise it: past a branch alone, Triton would not
        # see that the scores lead to another product, and lay them out for neither.
        b_top = tl.max(b_s, 1)
        if is_cut:
            b_s = tl.where((o_n < end % BLOCK_N)[None, :], b_s, float("-inf"))
        v_a, v_b = load(p_v, o_row, stride_v, HEAD_A, HEAD_B)
        acc_a, acc_b, b_max, b_sum = _fold_below(
            b_s, b_top, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B
        )

    b_scale = 1.0 / b_sum[:, None]
    acc_a = (acc_a * b_scale).to(out_ptr.dtype.element_ty)
    acc_b = (acc_b * b_scale).to(out_ptr.dtype.element_ty)
    store(out_ptr, o_m, m_m, stride_out_row, acc_a, acc_b, HEAD_A, HEAD_B)


@triton.jit
def _load_map(a_map, b_map, o_row, o_head, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    """As `load`, through tensor maps: Hopper's copy engine computes the addresses."""
    b_a = a_map.load([o_row, o_head])
    b_b = b_a
    if HEAD_B:
        b_b = b_map.load([o_row, o_head + HEAD_A])
    return b_a, b_b


@triton.jit
def attention_step_maps_kernel(
    q_ptr,
    k_a_map,
    k_b_map,
    v_a_map,
    v_b_map,
    k_cache_a_map,
    k_cache_b_map,
    v_cache_a_map,
    v_cache_b_map,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    stride_out_row,
    stride_cos_row,
    stride_sin_row,
    scale,  # log2(e) / sqrt(head_dim)
    SHARE: tl.constexpr,  # query heads per key head
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
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
    o_q_head = i_head * (HEAD_A + HEAD_B)
    o_k_head = (i_head // SHARE) * (HEAD_A + HEAD_B)
    q_ptr += first.to(tl.int64) * stride_q_row + o_q_head
    out_ptr += first.to(tl.int64) * stride_out_row + o_q_head
    k_ptr += first_key.to(tl.int64) * stride_k_row + o_k_head
    v_ptr += first_key.to(tl.int64) * stride_v_row + o_k_head
    k_cache_ptr += cached_first.to(tl.int64) * stride_k_cache_row + o_k_head
    v_cache_ptr += cached_first.to(tl.int64) * stride_v_cache_row + o_k_head

    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
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

    # Two loops, since a map can't be chosen at run time. The maps know the tensors' ends, not the
    # groups', so only whole blocks are read through them.
    for i_block in range(cached // BLOCK_N):
        o_row = cached_first + i_block * BLOCK_N
        k_a, k_b = _load_map(k_cache_a_map, k_cache_b_map, o_row, o_k_head, HEAD_A, HEAD_B)
        b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
        v_a, v_b = _load_map(v_cache_a_map, v_cache_b_map, o_row, o_k_head, HEAD_A, HEAD_B)
        acc_a, acc_b, b_max, b_sum = fold(b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B)
    for i_block in range(keys // BLOCK_N):
        o_row = first_key + i_block * BLOCK_N
        k_a, k_b = _load_map(k_a_map, k_b_map, o_row, o_k_head, HEAD_A, HEAD_B)
        b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
        v_a, v_b = _load_map(v_a_map, v_b_map, o_row, o_k_head, HEAD_A, HEAD_B)
        acc_a, acc_b, b_max, b_sum = fold(b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B)

    acc_a, acc_b, b_max, b_sum = tails(
        q_a, q_b, acc_a, acc_b, b_max, b_sum, scale,
        k_ptr, v_ptr, stride_k_row, stride_v_row, keys,
        k_cache_ptr, v_cache_ptr, stride_k_cache_row, stride_v_cache_row, cached,
        HEAD_A, HEAD_B, BLOCK_N,
    )  # fmt: skip
    b_scale = 1.0 / b_sum[:, None]
    acc_a = (acc_a * b_scale).to(out_ptr.dtype.element_ty)
    acc_b = (acc_b * b_scale).to(out_ptr.dtype.element_ty)
    store(out_ptr, o_m, m_m, stride_out_row, acc_a, acc_b, HEAD_A, HEAD_B)


@triton.jit(do_not_specialize=["wanted"])
def attention_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_rows_ptr,
    kv_end_ptr,
    wanted,  # the first row of a group whose attention is wanted
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_out_row,
    scale,  # log2(e) / sqrt(head_dim)
    SHARE: tl.constexpr,  # query heads per key head
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_LOOP: tl.constexpr,  # over blocks that are masked and those that are not
):
    # the last tiles of a causal sequence are the longest: they start first
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_group = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_rows_ptr + i_group)
    rows = tl.load(cu_rows_ptr + i_group + 1) - first
    if wanted + i_tile * BLOCK_M >= rows:
        return

    o_q_head = i_head * (HEAD_A + HEAD_B)
    o_k_head = (i_head // SHARE) * (HEAD_A + HEAD_B)
    q_ptr += first.to(tl.int64) * stride_q_row + o_q_head
    out_ptr += first.to(tl.int64) * stride_out_row + o_q_head
    k_ptr += first.to(tl.int64) * stride_k_row + o_k_head
    v_ptr += first.to(tl.int64) * stride_v_row + o_k_head

    o_m = wanted + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    q_a, q_b = load_some(q_ptr, o_m, m_m, stride_q_row, HEAD_A, HEAD_B)
    b_end = tl.minimum(tl.load(kv_end_ptr + first + o_m, mask=m_m, other=0), rows)
    # rows past the end of the group must not shorten what the others see without a mask
    end_of_all = tl.min(tl.where(m_m, b_end, rows), 0)
    end_of_any = tl.max(b_end, 0)

    # The row's own key starts the running softmax: its score is a finite maximum from the first
    # block on, even for a row that the block shows nothing. Its value counts here only where
    # kv_end does not cover the row itself; elsewhere it comes with its block.
    own_a, own_b = load_some(k_ptr, o_m, m_m, stride_k_row, HEAD_A, HEAD_B)
    b_max = tl.sum(q_a.to(tl.float32) * own_a.to(tl.float32), 1)
    if HEAD_B:
        b_max += tl.sum(q_b.to(tl.float32) * own_b.to(tl.float32), 1)
    b_max = b_max * scale
    b_sum = tl.where(b_end <= o_m, 1.0, 0.0)
    own_a, own_b = load_some(v_ptr, o_m, m_m & (b_end <= o_m), stride_v_row, HEAD_A, HEAD_B)
    acc_a = own_a.to(tl.float32)
    acc_b = own_b.to(tl.float32)

    blocks_of_all = end_of_all // BLOCK_N
    if ONE_LOOP:
        # Blocks that not every row sees all of come last; past the end of any, its last row again.
        # Addresses and the pipeline of loads are set up once: on 10.0 that takes fewer registers.
        # Elsewhere Triton lays the scores out worse than without the branch, or spills.
        for i_block in range(tl.cdiv(end_of_any, BLOCK_N)):
            is_cut = i_block >= blocks_of_all
            o_row = i_block * BLOCK_N + o_n
            o_key = o_row
            if is_cut:
                o_key = tl.minimum(o_row, end_of_any - 1)
            k_a, k_b = load(k_ptr, o_key, stride_k_row, HEAD_A, HEAD_B)
            b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
            b_top = tl.max(b_s, 1)  # ahead of the branch, as in the step
            if is_cut:
                b_s = tl.where(o_row[None, :] < b_end[:, None], b_s, float("-inf"))
                b_top = tl.max(b_s, 1)
            v_a, v_b = load(v_ptr, o_key, stride_v_row, HEAD_A, HEAD_B)
            acc_a, acc_b, b_max, b_sum = _fold_below(
                b_s, b_top, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B
            )
    else:
        for i_block in range(blocks_of_all):
            o_row = i_block * BLOCK_N + o_n
            k_a, k_b = load(k_ptr, o_row, stride_k_row, HEAD_A, HEAD_B)
            b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
            v_a, v_b = load(v_ptr, o_row, stride_v_row, HEAD_A, HEAD_B)
            acc_a, acc_b, b_max, b_sum = fold(
                b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B
            )

        for i_block in tl.range(blocks_of_all, tl.cdiv(end_of_any, BLOCK_N), num_stages=1):
            o_row = i_block * BLOCK_N + o_n
            m_n = o_row < end_of_any
            k_a, k_b = load_some(k_ptr, o_row, m_n, stride_k_row, HEAD_A, HEAD_B)
            b_s = scores(q_a, q_b, k_a, k_b, HEAD_B)
            b_s = tl.where(o_row[None, :] < b_end[:, None], b_s, float("-inf"))
            v_a, v_b = load_some(v_ptr, o_row, m_n, stride_v_row, HEAD_A, HEAD_B)
            acc_a, acc_b, b_max, b_sum = fold(
                b_s, v_a, v_b, acc_a, acc_b, b_max, b_sum, scale, HEAD_B
            )

    b_scale = 1.0 / b_sum[:, None]
    acc_a = (acc_a * b_scale).to(out_ptr.dtype.element_ty)
    acc_b = (acc_b * b_scale).to(out_ptr.dtype.element_ty)
    store(out_ptr, o_m, m_m, stride_out_row, acc_a, acc_b, HEAD_A, HEAD_B)


def attention_step(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim]
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32
    cache_start: Tensor,  # [groups], int32
    cache_len: Tensor,  # [groups], int32
    max_rows: int,
    cu_keys: Tensor | None = None,  # [groups + 1], int32
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    spans: list[int] | None = None,  # [6 * groups], read by libraries alone
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Launches the step's attention; see `reference.attention_step`.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.attention_step`.
    """
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin, spans
    contract.attention_step(q, k, v, k_cache, v_cache, *places, fused=True)
    out = output_of(q, out)
    groups = cu_rows.shape[0] - 1
    if not q.shape[0] or not groups:
        return out
    heads, head_dim = q.shape[1:]
    head_a, head_b = PARTS[head_dim]
    chosen = launch.choose("attention_step", q, head_dim)
    grid = (triton.cdiv(max_rows, chosen.block_m), heads, groups)
    kernel, maps = attention_step_kernel, []
    if chosen.tensor_maps and all(map(_mappable, (k, v, k_cache, v_cache))):
        kernel = attention_step_maps_kernel
        maps = [
            _map(x, chosen.block_n, part or head_a)
            for x in (k, v, k_cache, v_cache)
            for part in (head_a, head_b)
        ]
    kernel[grid](
        q,
        *maps,
        k,
        v,
        k_cache,
        v_cache,
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
        k_cache.stride(0),
        v_cache.stride(0),
        out.stride(0),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        SHARE=heads // k.shape[1],
        HEAD_A=head_a,
        HEAD_B=head_b,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out


def attention_prefill(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32
    kv_end: Tensor,  # [rows], int32
    max_rows: int,
    first: int = 0,
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Launches the prefill's attention; see `reference.attention_prefill`.

    Key blocks past a tile's largest `kv_end` are not visited, those before its smallest take no
    mask. A `kv_end` past the group's end means the group's end.

    Args:
        out: written and returned where given, else allocated.

    Raises:
        TypeError, ValueError: see `contract.attention_prefill`.
    """
    contract.attention_prefill(q, k, v, cu_rows, kv_end, max_rows, first, fused=True)
    out = output_of(q, out)
    groups = cu_rows.shape[0] - 1
    if not q.shape[0] or not groups or first == max_rows:
        return out
    heads, head_dim = q.shape[1:]
    head_a, head_b = PARTS[head_dim]
    chosen = launch.choose("attention_prefill", q, head_dim)
    grid = (triton.cdiv(max_rows - first, chosen.block_m), heads, groups)
    attention_prefill_kernel[grid](
        q,
        k,
        v,
        out,
        cu_rows,
        kv_end,
        first,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        out.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        SHARE=heads // k.shape[1],
        HEAD_A=head_a,
        HEAD_B=head_b,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        ONE_LOOP=chosen.one_loop,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out


def output_of(q: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    contract.same("out", out, q)
    return out


def _mappable(x: Tensor) -> bool:
    """Whether a tensor map can describe the rows of `x`: all of 16 bytes, and some."""
    return bool(x.shape[0]) and not (x.data_ptr() | x.stride(0) * x.element_size()) % 16


def _map(x: Tensor, block: int, part: int) -> TensorDescriptor:
    """A tensor map of blocks of rows by a part of a head."""
    shape = [x.shape[0], x.shape[1] * x.shape[2]]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [block, part])
