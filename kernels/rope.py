"""Rotary position embedding on the fused QKV product, and its way into the condition cache.

    (a, b) -> (a cos - b sin, b cos + a sin)        (rotate-half; Su et al., 2021)

with a, b the two halves of a head. A program takes one row: its cosines and sines are read once for
all heads. Pairs are numbered through all rotated heads, (head, place in the half), so that a half
of 48 leaves no lane idle. In float32, rounded once. Writing the cache from here spares the keys a
second reading, 2 * kv_heads * head_dim bytes a row in bfloat16, and a launch. `reference.rope_` and
`reference.rope_cache_` are the specifications.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch


@triton.jit
def rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cache_rows_ptr,
    stride_qkv_row,
    stride_cos_row,
    stride_sin_row,
    stride_k_cache_row,
    stride_v_cache_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    CACHE: tl.constexpr,  # whether keys and values are written to the cache
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    qkv_ptr += i_row * stride_qkv_row
    cos_ptr += i_row * stride_cos_row
    sin_ptr += i_row * stride_sin_row
    if CACHE:
        cache_row = tl.load(cache_rows_ptr + i_row)
        k_cache_ptr += cache_row * stride_k_cache_row
        v_cache_ptr += cache_row * stride_v_cache_row
    o_block = tl.arange(0, BLOCK)

    for start in tl.static_range(0, (HEADS + KV_HEADS) * HALF, BLOCK):
        o_pair = start + o_block
        m_pair = o_pair < (HEADS + KV_HEADS) * HALF
        o_head = o_pair // HALF
        o_half = o_pair % HALF
        p_a = qkv_ptr + o_head * (2 * HALF) + o_half
        b_a = tl.load(p_a, mask=m_pair, other=0.0).to(tl.float32)
        b_b = tl.load(p_a + HALF, mask=m_pair, other=0.0).to(tl.float32)
        b_cos = tl.load(cos_ptr + o_half, mask=m_pair, other=0.0)
        b_sin = tl.load(sin_ptr + o_half, mask=m_pair, other=0.0)
        b_new_a = (b_a * b_cos - b_b * b_sin).to(qkv_ptr.dtype.element_ty)
        b_new_b = (b_b * b_cos + b_a * b_sin).to(qkv_ptr.dtype.element_ty)
        tl.store(p_a, b_new_a, mask=m_pair)
        tl.store(p_a + HALF, b_new_b, mask=m_pair)
        if CACHE:
            m_key = m_pair & (o_head >= HEADS)
            p_key = k_cache_ptr + (o_head - HEADS) * (2 * HALF) + o_half
            tl.store(p_key, b_new_a, mask=m_key)
            tl.store(p_key + HALF, b_new_b, mask=m_key)

    if CACHE:
        p_values = qkv_ptr + (HEADS + KV_HEADS) * (2 * HALF)
        for start in tl.static_range(0, KV_HEADS * (2 * HALF), BLOCK):
            o_value = start + o_block
            m_value = o_value < KV_HEADS * (2 * HALF)
            b_value = tl.load(p_values + o_value, mask=m_value)
            tl.store(v_cache_ptr + o_value, b_value, mask=m_value)


def rope_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    keys_only: bool = False,  # whether q stays as it is, for attention to rotate
) -> None:
    """Launches the rotation; see `reference.rope_`.

    Raises:
        TypeError, ValueError: see `contract.rope_`.
    """
    contract.rope_(qkv, cos, sin, heads, kv_heads, keys_only, fused=True)
    if keys_only:
        qkv, heads = qkv[:, 2 * heads * cos.shape[1] :], 0
    # without a cache its arguments are placeholders: the kernel does not touch them
    _launch("rope_", qkv, cos, sin, heads, kv_heads, qkv, qkv, qkv, 0, 0)


def rope_cache_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct, inside the cache
) -> None:
    """Launches rotation and cache write; see `reference.rope_cache_`.

    Raises:
        TypeError, ValueError: see `contract.rope_cache_`. The values of `cache_rows` live on the
            device and are not checked.
    """
    contract.rope_cache_(qkv, cos, sin, heads, kv_heads, k_cache, v_cache, cache_rows, fused=True)
    _launch(
        "rope_cache_",
        qkv,
        cos,
        sin,
        heads,
        kv_heads,
        k_cache,
        v_cache,
        cache_rows,
        k_cache.stride(0),
        v_cache.stride(0),
    )


def _launch(
    name: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    stride_k_cache_row: int,
    stride_v_cache_row: int,
) -> None:
    rows = qkv.shape[0]
    if not rows:
        return
    half = cos.shape[1]
    chosen = launch.choose(name, qkv)
    rope_kernel[(rows,)](
        qkv,
        cos,
        sin,
        k_cache,
        v_cache,
        cache_rows,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        stride_k_cache_row,
        stride_v_cache_row,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        CACHE=name == "rope_cache_",
        BLOCK=min(chosen.block, triton.next_power_of_2((heads + kv_heads) * half)),
        num_warps=chosen.num_warps,
    )
