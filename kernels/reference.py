"""Every operation in plain PyTorch: the specification, and what runs where no kernel can.

The rows of several guidance branches are concatenated in one tensor ("packed"); a *group* is a
run of rows that attend as one sequence. Sums, exponentials and rotations are done in float32 at
least (float64 inputs stay float64), results are rounded once to the input's dtype. Where an
operation takes `out`, that is where its result goes, so that a loop needs no new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import widened
from .contract import GROUP, LARGEST, cache_parts

# Rows of queries that share one mask in `attention_prefill`: bounds the mask at this many rows.
_PREFILL_BLOCK = 256
# Largest score matrix of the plain softmax, in elements.
_PLAIN_SCORES = 1 << 26


# Of queries, keys and values that are copied to float32 at once, in elements, if of several heads.
_WIDENED_VALUES = 1 << 23
# Of a product's int32 sums at once on a CPU, in elements: PyTorch's allocator reuses that much.
_CPU_SUMS = 1 << 22

# On a CPU, rows are processed in blocks whose float32 copies stay in the cache.
_CPU_BLOCK_VALUES = 1 << 18

# Float16's exponents lie 8 higher than those of float8_e4m3fn.
_E4M3_UNIT = 1 << 8

# Quantiles of the normal distribution, scaled to end at 1, with an exact zero (Dettmers et al.,
# 2023). In float32.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _block_rows(x: Tensor) -> int:
    """Rows of `x` to process at once: all of them, except on a CPU."""
    if x.device.type == "cpu":
        return min(max(1, _CPU_BLOCK_VALUES * len(x) // max(1, x.numel())), len(x))
    return len(x)


def _scratch(x: Tensor, count: int) -> list[Tensor]:
    """Tensors for a block of `x` to accumulate in.

    Made once and used by all blocks: fresh pages cost a CPU more than the arithmetic on them.
    """
    shape = (_block_rows(x), *x.shape[1:])
    return [x.new_empty(shape, dtype=_wide(x.dtype)) for _ in range(count)]


def _blocks(x: Tensor, scratch: Sequence[Tensor] = ()) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the rows of `x` to process one after the other, and as many rows of `scratch`."""
    rows = len(scratch[0]) if scratch else _block_rows(x)
    for start in range(0, len(x), max(1, rows)):
        stop = min(start + rows, len(x))
        yield slice(start, stop), [one[: stop - start] for one in scratch]


def _out(shape: torch.Size, like: Tensor, out: Tensor | None) -> Tensor:
    """Where a result goes: what the caller gave, or new memory."""
    return torch.empty(shape, dtype=like.dtype, device=like.device) if out is None else out


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang & Sennrich, 2019)."""
    out = _out(x.shape, x, out)
    for rows, (wide,) in _blocks(x, _scratch(x, 1)):
        _rms_norm_block(x[rows], weight, eps, out[rows], wide)
    return out


def _rms_norm_block(x: Tensor, weight: Tensor, eps: float, out: Tensor, wide: Tensor) -> None:
    wide.copy_(x)
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    wide.mul_(squares.div_(x.shape[-1]).add_(eps).rsqrt_())
    out.copy_(wide).mul_(weight)


def quantise_(
    x: Tensor,  # [rows, width]
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """Rows in 8 bits: `values = round(x / scales)`, `scales = max|x| / largest` of each row.

    `largest` is 127 in int8 and 448 in float8_e4m3fn. A row that holds NaN has a scale of NaN.
    """
    for rows, (wide,) in _blocks(x, _scratch(x, 1)):
        _quantise_block(wide.copy_(x[rows]), values[rows], scales[rows])


def _quantise_block(wide: Tensor, values: Tensor, scales: Tensor) -> None:
    """`wide` is overwritten."""
    if not wide.numel():
        return
    # two reductions: a CPU takes 20 times as long for the infinity norm, or for both at once
    largest = torch.maximum(wide.amax(1), wide.amin(1).neg_())
    largest.clamp_min_(1e-20)  # of rows that hold zeros alone
    # times the reciprocal: GPUs divide by a constant that way, and results must not differ
    scales.copy_(largest * (1 / LARGEST[values.dtype]))
    wide.mul_((LARGEST[values.dtype] / largest).unsqueeze(1))
    values.copy_(wide.round_() if values.dtype == torch.int8 else wide)


def rms_norm_quantise_(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    values: Tensor,  # [rows, hidden], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """`rms_norm`, its rows in 8 bits as `quantise_` makes them; not rounded in between."""
    for rows, (wide,) in _blocks(x, _scratch(x, 1)):
        _rms_norm_block(x[rows], weight, eps, wide, wide)
        _quantise_block(wide, values[rows], scales[rows])


def scaled_mm_(
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn
    scales: Tensor,  # [rows], float32
    weight: Tensor,  # [columns, width], of the dtype of values
    weight_scales: Tensor,  # [columns], float32
    result: Tensor,  # [rows, columns], written
    accumulate: bool = False,  # whether the product is added to what is there
) -> None:
    """`(values @ weight.T) * scales[:, None] * weight_scales`, the sums of int8 exact on a CPU.

    Added to `result` where `accumulate` says so, and rounded once then, too.
    """
    on_cpu = values.device.type == "cpu"
    columns = max(1, _CPU_SUMS // max(1, len(values))) if on_cpu else max(1, len(weight))
    # blocks of columns rather than of rows: a product rearranges its weights first
    for start in range(0, len(weight), columns):
        block = slice(start, start + columns)
        sums = _sums(values, weight[block])
        for rows, (wide,) in _blocks(sums, _scratch(sums, 1)):
            wide.copy_(sums[rows]).mul_(scales[rows].unsqueeze(1))
            wide.mul_(weight_scales[block])
            result[rows, block] = wide.add_(result[rows, block]) if accumulate else wide


def _sums(values: Tensor, weight: Tensor) -> Tensor:
    """`values @ weight.T`, int32 where a CPU multiplies int8, else float32."""
    if values.dtype == torch.int8 and values.device.type == "cpu":
        return torch._int_mm(values, weight.t())
    return values.float() @ weight.float().t()


def rope_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    keys_only: bool = False,  # whether q stays as it is, for attention to rotate
) -> None:
    """Rotary position embedding, rotate-half layout (Su et al., 2021), on a fused QKV product.

    `(a, b) -> (a cos - b sin, b cos + a sin)` with a, b the two halves of each head.
    """
    by_head = qkv.unflatten(1, (heads + 2 * kv_heads, -1))
    turned = by_head[:, heads * keys_only : heads + kv_heads]
    _rotate(turned, cos, sin, turned)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Heads [rows, heads, head_dim] rotated; `out` may be `x`."""
    half = cos.shape[1]
    for rows, (wide, rotated) in _blocks(x, _scratch(x, 2)):
        wide.copy_(x[rows])
        a, b = wide[..., :half], wide[..., half:]
        c, s = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
        torch.mul(a, c, out=rotated[..., :half]).addcmul_(b, s, value=-1)
        torch.mul(b, c, out=rotated[..., half:]).addcmul_(a, s)
        out[rows] = rotated


def rope_cache_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct
) -> None:
    """`rope_`, and the rotated keys and the values of every row written to the condition cache."""
    rope_(qkv, cos, sin, heads, kv_heads)
    _write_cache_(qkv, heads, kv_heads, k_cache, v_cache, cache_rows)


def _write_cache_(
    qkv: Tensor, heads: int, kv_heads: int, k_cache: Tensor, v_cache: Tensor, cache_rows: Tensor
) -> None:
    """The part of `rope_cache_` that writes; of tensors that it takes."""
    by_head = qkv.unflatten(1, (heads + 2 * kv_heads, -1))
    k_cache.index_copy_(0, cache_rows, by_head[:, heads : heads + kv_heads])
    v_cache.index_copy_(0, cache_rows, by_head[:, heads + kv_heads :])


def quantise_cache_(
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8, written at `cache_rows`
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache, written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct
) -> None:
    """Keys and values in 8 bits to the condition cache: each head of a row as by `quantise_`.

    A row has the values of all heads, in int8 or as the bits of float8_e4m3fn (uint8), and a
    float32 scale for each head in its last bytes (`contract.cache_parts`).
    """
    for x, cache in ((k, k_cache), (v, v_cache)):
        values, scales = cache_parts(cache, *x.shape[1:])
        form = torch.int8 if cache.dtype == torch.int8 else torch.float8_e4m3fn
        new = torch.empty(x.shape, dtype=form, device=x.device)
        new_scales = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        quantise_(x.flatten(0, 1), new.flatten(0, 1), new_scales.flatten())
        values.index_copy_(0, cache_rows, new.view(cache.dtype))
        scales.index_copy_(0, cache_rows, new_scales)


def _dequantised(
    cache: Tensor,  # [rows, width], int8 or uint8
    like: Tensor,  # [..., kv_heads, head_dim]
) -> Tensor:  # [rows, kv_heads, head_dim], of the dtype of `like`
    """Rows of a cache in 8 bits, rounded once."""
    values, scales = cache_parts(cache, *like.shape[1:])
    found = torch.empty(values.shape, dtype=like.dtype, device=like.device)
    for rows, (wide,) in _blocks(found, _scratch(found, 1)):
        scale = scales[rows].to(wide.dtype).unsqueeze(2)
        if cache.dtype == torch.uint8:
            wide.copy_(_e4m3(values[rows]))
            scale = scale * _E4M3_UNIT
        else:
            wide.copy_(values[rows])
        found[rows] = wide.mul_(scale)
    return found


def _by_head(x: Tensor, groups: int) -> Tensor:
    """[rows, heads, head_dim] to a [groups, heads / groups, rows, head_dim] view.

    Query head h reads key head h // groups, so the query heads that share a key head become a
    batch axis along which keys and values need no copy.
    """
    return x.unflatten(1, (-1, groups)).permute(2, 1, 0, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of [batch, heads, rows, head_dim] views, and its log-sum-exp (float32 up).

    The log-sum-exp lets two key segments be joined without laying them side by side.
    """
    if q.shape[2] and k.shape[2]:
        if q.device.type == "cpu":
            return _attend_on_cpu(q, k, v)
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return _plain_attend(q, k, v)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if not widened.faster(q.dtype):
        return attend(q, k, v)[:2]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for heads, wide in _widened(q, k, v):
        out[:, heads], lse[:, heads] = attend(*wide)[:2]
    return out, lse


def _widened(
    q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """Views as for `_attend`: some heads after others in float32 where a CPU multiplies it faster,
    so that the copies are bounded; else all at once, as they are."""
    if q.device.type != "cpu" or not widened.faster(q.dtype):
        yield slice(None), (q, k, v)
        return
    values = (len(q) * q.shape[2] + 2 * k.shape[2]) * q.shape[3]
    some = max(1, _WIDENED_VALUES // max(1, values))
    for first in range(0, q.shape[1], some):
        heads = slice(first, first + some)
        yield heads, (q[:, heads].float(), _copy_once(k[:, heads]), _copy_once(v[:, heads]))


def _copy_once(x: Tensor) -> Tensor:
    """In float32; what several query heads share is copied once."""
    return x.float() if x.stride(0) else x[:1].float().expand(x.shape)


def _plain_attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`_attend` without a fused kernel, in blocks of queries whose scores are bounded."""
    wide = _wide(q.dtype)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    block = max(1, _PLAIN_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], block):
        rows = slice(start, start + block)
        scores = (q[:, :, rows].to(wide) @ k.transpose(2, 3).to(wide)) * q.shape[3] ** -0.5
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        out[:, :, rows] = (torch.softmax(scores, dim=-1) @ v.to(wide)).to(q.dtype)
    return out, lse


def attention_step(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], one layer of the condition cache
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32: group g has rows cu_rows[g] to cu_rows[g + 1]
    cache_start: Tensor,  # [groups], int32: its first cache row
    cache_len: Tensor,  # [groups], int32: how many cache rows it sees, may be 0
    max_rows: int,  # rows of the longest group
    cu_keys: Tensor | None = None,  # [groups + 1], int32: as cu_rows, of k and v where they differ
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    spans: list[int] | None = None,  # [6 * groups]: what the five tensors say, for libraries
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Attention of a denoising step: every row sees its group's cache rows and its own group.

    `softmax(q [K_cache, K]^T / sqrt(head_dim)) [V_cache, V]`, the two key segments joined by their
    log-sum-exp (Milakov & Gimelshein, 2018): no concatenation, no mask. Several groups may read
    the same cache rows. Without `cu_keys` a group's rows are those of q, k and v alike; with it, q
    has some of the rows that k and v have. `spans` says the same on the host, for a library that
    takes lengths from there (`library`): of each group the first row and the one after the last,
    then both of its keys, then both of its cache rows. With `cos` and `sin`, q is first rotated as
    by `rope_`; it stays as it is in memory.
    """
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin
    return _step(q, k, v, lambda rows: (k_cache[rows], v_cache[rows]), *places, out)


def attention_step_8bit(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8, one layer of the condition cache
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache
    cu_rows: Tensor,  # [groups + 1], int32: group g has rows cu_rows[g] to cu_rows[g + 1]
    cache_start: Tensor,  # [groups], int32: its first cache row
    cache_len: Tensor,  # [groups], int32: how many cache rows it sees, may be 0
    max_rows: int,  # rows of the longest group
    cu_keys: Tensor | None = None,  # [groups + 1], int32: as cu_rows, of k and v where they differ
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """`attention_step` with a cache that `quantise_cache_` has written."""

    def cached_rows(rows: slice) -> tuple[Tensor, Tensor]:
        return _dequantised(k_cache[rows], k), _dequantised(v_cache[rows], k)

    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin
    return _step(q, k, v, cached_rows, *places, out)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_rows: Callable[[slice], tuple[Tensor, Tensor]],
    cu_rows: Tensor,
    cache_start: Tensor,
    cache_len: Tensor,
    max_rows: int,
    cu_keys: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`attention_step`; `cached_rows` gives keys and values of rows of the cache."""
    out = _out(q.shape, q, out)
    share = q.shape[1] // k.shape[1]
    scratch = _scratch(q[:max_rows].unflatten(1, (-1, share)), 2)
    bounds = cu_rows.tolist()
    groups = zip(
        pairwise(bounds),
        pairwise(bounds if cu_keys is None else cu_keys.tolist()),
        cache_start.tolist(),
        cache_len.tolist(),
    )
    for (start, stop), keys, first, length in groups:
        rows, own_keys, cached = slice(start, stop), slice(*keys), slice(first, first + length)
        queries = q[rows]
        if cos is not None and sin is not None:
            # in the place of the result, which is written when the queries are done with
            _rotate(queries, cos[rows], sin[rows], out[rows])
            queries = out[rows]
        queries = _by_head(queries, share)
        views = [_by_head(t, 1).expand(share, -1, -1, -1) for t in (k[own_keys], v[own_keys])]
        own, own_lse = _attend(queries, *views)
        if length:
            views = [_by_head(t, 1).expand(share, -1, -1, -1) for t in cached_rows(cached)]
            cache_out, cache_lse = _attend(queries, *views)
            weight = torch.sigmoid(cache_lse - own_lse)  # of the cache's part
            target = out[rows].unflatten(1, (-1, share))
            own, cache_out = own.permute(2, 1, 0, 3), cache_out.permute(2, 1, 0, 3)
            weight = weight.permute(2, 1, 0).unsqueeze(-1)
            for some, (a, b) in _blocks(own, scratch):
                a.copy_(own[some])
                target[some] = a.lerp_(b.copy_(cache_out[some]), weight[some])
        else:
            _by_head(out[rows], share).copy_(own)
    return out


def join_segments(
    a: Tensor,  # [rows, heads, head_dim]: attention over one segment of keys
    a_lse: Tensor,  # [rows, heads], float32: log-sum-exp of its scaled scores
    b: Tensor,  # [rows, heads, head_dim]: over another
    b_lse: Tensor,  # [rows, heads], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Attention over both segments: `(exp(a_lse) a + exp(b_lse) b) / (exp(a_lse) + exp(b_lse))`.

    An infinite log-sum-exp, of either sign, is that of a segment without keys: its values count
    nothing, whatever they are. Where neither has keys, the result is zero.
    """
    out = _out(a.shape, a, out)
    lses = [one.masked_fill(one.isposinf(), -torch.inf) for one in (a_lse, b_lse)]
    top = torch.maximum(*lses)
    top.masked_fill_(top.isneginf(), 0)
    shares = [torch.exp(one - top) for one in lses]
    total = shares[0] + shares[1]
    total.masked_fill_(total == 0, 1)
    shares = [(one / total).unsqueeze(2) for one in shares]
    for rows, wide in _blocks(a, _scratch(a, 2)):
        for part, x, share in zip(wide, (a, b), shares):
            part.copy_(x[rows]).mul_(share[rows]).masked_fill_(share[rows] == 0, 0)
        out[rows] = wide[0].add_(wide[1])
    return out


def attention_prefill(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32
    kv_end: Tensor,  # [rows], int32, counted from the first row of the row's group
    max_rows: int,  # rows of the longest group
    first: int = 0,  # of each group, the row whose attention is wanted first
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """Attention over the condition: a row sees its group's rows 0 to kv_end, and itself.

    For a text token kv_end is its own place + 1 (causal); for a token of an input image the end of
    that image; for a time token the end of the condition, so that time tokens, which stand behind
    the condition, do not see one another. The rows of a group before `first` are keys and values
    only: their own attention was computed before, and `out` keeps what it has there.
    """
    out = _out(q.shape, q, out)
    share = q.shape[1] // k.shape[1]
    ends = kv_end.tolist()
    for start, stop in pairwise(cu_rows.tolist()):
        for block_start in range(start + first, stop, _PREFILL_BLOCK):
            block_stop = min(block_start + _PREFILL_BLOCK, stop)
            rows = slice(block_start, block_stop)
            outside = [
                i - start + 1 for i in range(block_start, block_stop) if ends[i] <= i - start
            ]
            seen = max(ends[rows] + outside)
            mask = None
            if min(ends[rows]) < seen:
                places = torch.arange(seen, device=q.device)
                own = torch.arange(block_start - start, block_stop - start, device=q.device)
                mask = (places < kv_end[rows, None]) | (places == own[:, None])
            keys = slice(start, start + seen)
            seen_k, seen_v = (_by_head(t[keys], 1).expand(share, -1, -1, -1) for t in (k, v))
            queries = _by_head(q[rows], share)
            result = _by_head(out[rows], share)
            for heads, wide in _widened(queries, seen_k, seen_v):
                result[:, heads] = F.scaled_dot_product_attention(*wide, attn_mask=mask)
    return out


def swiglu(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    out: Tensor | None = None,  # [rows, intermediate]; may be gate_up's own first half
) -> Tensor:  # [rows, intermediate]
    """`silu(gate) * up` (Shazeer, 2020) on the fused gate-up product."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = _out(gate.shape, gate, out)
    for rows, _ in _blocks(gate_up):
        torch.mul(F.silu(gate[rows]), up[rows], out=out[rows])
    return out


def swiglu_quantise_(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    values: Tensor,  # [rows, intermediate], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """`swiglu`, its rows in 8 bits as `quantise_` makes them; not rounded in between."""
    gate, up = gate_up.chunk(2, dim=-1)
    for rows, (wide, factor) in _blocks(gate, _scratch(gate, 2)):
        wide.copy_(gate[rows])
        F.silu(wide, inplace=True).mul_(factor.copy_(up[rows]))
        _quantise_block(wide, values[rows], scales[rows])


def modulate(
    x: Tensor,  # [rows, hidden]: equal groups of rows, one after the other
    shift: Tensor,  # [steps, hidden]
    scale: Tensor,  # [steps, hidden]
    step: Tensor,  # [groups], int64: the row of both that each group takes
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]; may be x
) -> Tensor:  # [rows, hidden]
    """LayerNorm without weights, then `x * (1 + scale) + shift` (adaLN; Peebles & Xie, 2022).

    Group g, of `rows / groups` rows, takes row `step[g]` of shift and scale.
    """
    out = _out(x.shape, x, out)
    by_group = (len(step), len(x) // len(step))
    shift, scale = shift[step].unsqueeze(1), scale[step].unsqueeze(1)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(0, by_group)
    torch.addcmul(shift, normed, 1 + scale, out=out.unflatten(0, by_group))
    return out


def guidance_step_(
    latents: Tensor,  # [images, channels, height, width], float32, updated in place
    prediction: Tensor,  # [groups, tokens, patch * patch * channels], (row, column, channel)
    coefficient: Tensor,  # [groups], float32: the weight of each branch's velocity
    cu_groups: Tensor,  # [images + 1], int32: image i has groups cu_groups[i] to cu_groups[i + 1]
    lengths: Tensor,  # [steps], float32: of the Euler steps
    step: Tensor,  # [images], int64: the one that each image takes
    patch: int,
) -> None:
    """Guidance, unpatchify and the Euler step: `latents += length * sum_g coefficient_g v_g`.

    Image i takes the length `lengths[step[i]]`.
    """
    channels, height, width = latents.shape[1:]
    taken = lengths[step]
    for image, (start, stop) in enumerate(pairwise(cu_groups.tolist())):
        weights = coefficient[start:stop].to(latents.dtype)
        branches = prediction[start:stop].to(latents.dtype)
        velocity = (weights[:, None, None] * branches).sum(0)
        velocity = velocity.view(height // patch, width // patch, patch, patch, channels)
        velocity = velocity.permute(4, 0, 2, 1, 3).reshape(channels, height, width)
        latents[image] += taken[image] * velocity


def dequantise_int8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 64], int8
    scales: Tensor,  # [rows, groups], bfloat16
) -> None:
    """`values * scales`, each scale for 64 columns; values beyond the weight's columns fill up.

    The integers are exact in every dtype that a weight may have, so the product rounds once.
    """
    columns, groups = weight.shape[1], scales.shape[1]
    whole = columns // GROUP * GROUP
    weight.copy_(values[:, :columns])
    weight[:, :whole].unflatten(1, (whole // GROUP, GROUP)).mul_(scales[:, : whole // GROUP, None])
    if whole < columns:
        weight[:, whole:].mul_(scales[:, groups - 1 :])


def dequantise_fp8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, columns], uint8: bits of float8_e4m3fn
    scales: Tensor,  # [rows, 1], float32
) -> None:
    """`values * scales`, a scale for each row."""
    wide = _wide(weight.dtype)
    for rows, _ in _blocks(weight):
        found = _e4m3(values[rows]).to(wide)
        weight[rows] = found.mul_(_E4M3_UNIT * scales[rows].to(wide))


def _e4m3(bits: Tensor) -> Tensor:
    """Of uint8 bits of float8_e4m3fn the values in float16, in units of `_E4M3_UNIT`.

    Float16 has the same sign and mantissa in other places: a plain conversion takes a CPU ten times
    as long.
    """
    moved = bits.view(torch.int8).to(torch.int16)  # the sign twice
    return moved.mul_(1 << 7).bitwise_and_(~(1 << 14)).view(torch.float16)


def dequantise_nf4_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 32], uint8: two places in `NF4`, the first in the low half
    scales: Tensor,  # [rows, groups], uint8
    ranges: Tensor,  # [rows, 2], float32: lowest scale and step of the scales
) -> None:
    """`NF4[values] * (lowest + scales * step)`, each scale for 64 columns."""
    columns, wide = weight.shape[1], _wide(weight.dtype)
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device).to(wide)
    # both values of each byte, as one complex number
    pairs = torch.complex(table.repeat(16), table.repeat_interleave(16))
    for rows, _ in _blocks(weight):
        low, step = ranges[rows].to(wide).split(1, 1)
        scale = low + scales[rows].to(wide) * step
        stored = values[rows].long()
        found = torch.view_as_real(pairs.expand(len(stored), -1).gather(1, stored))
        by_group = found.flatten(1).unflatten(1, (-1, GROUP)).mul_(scale.unsqueeze(2))
        weight[rows] = by_group.flatten(1)[:, :columns]
