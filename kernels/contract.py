"""What every operation demands of its arguments, in one place for all implementations.

One function per operation, called before it runs: plain comparisons, a few microseconds. Values
that live on the device (lengths, row numbers) are not looked at, since that would wait for it.

All tensors of a call are on one device. "Rows" may lie apart (a view into a wider tensor), but what
stands inside a row is contiguous. `fused` adds what the kernels ask beyond the reference: bfloat16,
float16 or float32, and a head_dim they are written for. No alignment is demanded; rows whose
addresses are multiples of 16 bytes are read 16 bytes at a time, others more slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FUSED = (torch.bfloat16, torch.float16, torch.float32)
_FLOATS = (*_FUSED, torch.float64)
_WIDE = (torch.float32, torch.float64)
GROUP = 64  # columns of a weight that share a scale, in forms that have groups
HEAD_DIMS = (64, 96, 128)
# What values in 8 bits go up to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_QUANTISED = tuple(LARGEST)
# A row is held in the registers of one program.
MAX_HIDDEN = 65536
# so many products of int8 fit an int32
MAX_DEPTH = 131072
# Of a cache in 8 bits: int8, or the bits of float8_e4m3fn.
_CACHES = (torch.int8, torch.uint8)
_SCALE_BYTES = 4
_ROW_UNIT = 16


def cache_width(kv_heads: int, head_dim: int) -> int:
    """Bytes of a row of a cache in 8 bits: the values of all heads, room, a scale of each head.

    Rows begin at multiples of 16 bytes.
    """
    return -(-kv_heads * (head_dim + _SCALE_BYTES) // _ROW_UNIT) * _ROW_UNIT


def cache_parts(
    cache: Tensor,  # [cache rows, width], int8 or uint8
    kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:  # [cache rows, kv_heads, head_dim], [cache rows, kv_heads] float32
    """Values and scales of a cache in 8 bits, as views."""
    values = cache[:, : kv_heads * head_dim].unflatten(1, (kv_heads, head_dim))
    return values, cache[:, -_SCALE_BYTES * kv_heads :].view(torch.float32)


def _tensor(name: str, x: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")


def _rows(name: str, x: Tensor, dims: int, fused: bool) -> None:
    """Floating rows, contiguous inside."""
    _tensor(name, x, dims, _FUSED if fused else _FLOATS)
    _inside_contiguous(name, x)


def _inside_contiguous(name: str, x: Tensor) -> None:
    size = 1
    for length, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if stride != size and length != 1:
            raise ValueError(
                f"{name} must be contiguous inside a row, got shape {tuple(x.shape)} with "
                f"strides {x.stride()}; .contiguous() makes it so"
            )
        size *= length


def _written(name: str, x: Tensor) -> None:
    """Rows that are written must not share memory."""
    if x.shape[0] > 1 and x.stride(0) < x.shape[1:].numel():
        raise ValueError(
            f"{name} is written, so its rows must not overlap, got shape {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )


def _beside(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} must be on the device of {other}, {y.device}, got {x.device}")


def _shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def _like(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Of the same dtype, on the same device."""
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {y.dtype}, got {x.dtype}")
    _beside(name, x, other, y)


def _vector(name: str, x: Tensor, length: int, other: str, y: Tensor) -> None:
    _tensor(name, x, 1, _FLOATS)
    _like(name, x, other, y)
    _shape(name, x, (length,))
    _inside_contiguous(name, x[None])


def _numbers(name: str, x: Tensor, dtype: torch.dtype, other: str, y: Tensor) -> None:
    """Contiguous numbers for the kernel to read on the device."""
    _tensor(name, x, 1, (dtype,))
    _beside(name, x, other, y)
    _inside_contiguous(name, x[None])


def same(name: str, x: Tensor, y: Tensor) -> None:
    """An output that the caller brings: shape, dtype and device of `y`, rows apart.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _tensor(name, x, y.dim(), (y.dtype,))
    _beside(name, x, "the input", y)
    _shape(name, x, y.shape)
    _inside_contiguous(name, x)
    _written(name, x)


def _hidden(name: str, x: Tensor, fused: bool) -> None:
    _rows(name, x, 2, fused)
    if not 1 <= x.shape[1] <= MAX_HIDDEN:
        raise ValueError(f"{name} must have 1 to {MAX_HIDDEN} columns, got {x.shape[1]}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool = False) -> None:
    """x [rows, hidden], weight [hidden], of one dtype.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _hidden("x", x, fused)
    _vector("weight", weight, x.shape[1], "x", x)


def quantise_(x: Tensor, values: Tensor, scales: Tensor, fused: bool = False) -> None:
    """x [rows, width]; values [rows, width] int8 or float8_e4m3fn, scales [rows] float32.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _hidden("x", x, fused)
    _quantised("values", values, "scales", scales, tuple(x.shape), "x", x)


def _quantised(
    name: str,
    values: Tensor,
    name_of_scales: str,
    scales: Tensor,
    shape: tuple[int, ...],
    other: str,
    y: Tensor,
) -> None:
    """Rows in 8 bits and their scales, beside `y`."""
    _tensor(name, values, 2, _QUANTISED)
    _beside(name, values, other, y)
    _shape(name, values, shape)
    _inside_contiguous(name, values)
    _written(name, values)
    _numbers(name_of_scales, scales, torch.float32, other, y)
    _shape(name_of_scales, scales, shape[:1])


def rms_norm_quantise_(
    x: Tensor, weight: Tensor, eps: float, values: Tensor, scales: Tensor, fused: bool = False
) -> None:
    """x [rows, hidden], weight [hidden], of one dtype; values [rows, hidden] int8 or float8_e4m3fn,
    scales [rows] float32.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    rms_norm(x, weight, eps, fused)
    _quantised("values", values, "scales", scales, tuple(x.shape), "x", x)


def swiglu_quantise_(gate_up: Tensor, values: Tensor, scales: Tensor, fused: bool = False) -> None:
    """gate_up [rows, 2 * intermediate]; values [rows, intermediate] int8 or float8_e4m3fn, scales
    [rows] float32.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    swiglu(gate_up, fused)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if not 1 <= inner <= MAX_HIDDEN:
        raise ValueError(f"gate_up must have 2 to {2 * MAX_HIDDEN} columns, got {gate_up.shape[1]}")
    _quantised("values", values, "scales", scales, (rows, inner), "gate_up", gate_up)


def scaled_mm_(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    result: Tensor,
    accumulate: bool = False,
    fused: bool = False,
) -> None:
    """values [rows, width] and weight [columns, width], both int8 or both float8_e4m3fn; scales
    [rows] and weight_scales [columns] float32; result [rows, columns].

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _tensor("values", values, 2, _QUANTISED)
    _inside_contiguous("values", values)
    if not 1 <= values.shape[1] <= MAX_DEPTH:
        raise ValueError(f"values must have 1 to {MAX_DEPTH} columns, got {values.shape[1]}")
    _tensor("weight", weight, 2, _QUANTISED)
    _like("weight", weight, "values", values)
    _shape("weight", weight, (weight.shape[0], values.shape[1]))
    _inside_contiguous("weight", weight)
    for name, numbers, rows in (
        ("scales", scales, values),
        ("weight_scales", weight_scales, weight),
    ):
        _numbers(name, numbers, torch.float32, "values", values)
        _shape(name, numbers, (rows.shape[0],))
    _rows("result", result, 2, fused)
    _beside("result", result, "values", values)
    _shape("result", result, (values.shape[0], weight.shape[0]))
    _written("result", result)


def _rotary(name: str, x: Tensor, other: str, y: Tensor, half: int, fused: bool) -> None:
    """Cosines or sines for the rows of `y`."""
    _tensor(name, x, 2, _WIDE[:1] if fused else _WIDE)
    _beside(name, x, other, y)
    _shape(name, x, (y.shape[0], half))
    _inside_contiguous(name, x)


def rope_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    keys_only: bool = False,
    fused: bool = False,
) -> None:
    """qkv [rows, (heads + 2 * kv_heads) * head_dim], cos and sin [rows, head_dim / 2] float32.

    Any even head_dim.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides, heads or head_dim.
    """
    _rows("qkv", qkv, 2, fused)
    _written("qkv", qkv)
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"heads and kv_heads must be positive, got {heads} and {kv_heads}")
    parts = heads + 2 * kv_heads
    if not qkv.shape[1] or qkv.shape[1] % (2 * parts):
        raise ValueError(
            f"qkv must have heads + 2 * kv_heads = {parts} heads of an even head_dim, got "
            f"{qkv.shape[1]} columns"
        )
    half = qkv.shape[1] // (2 * parts)
    _rotary("cos", cos, "qkv", qkv, half, fused)
    _rotary("sin", sin, "qkv", qkv, half, fused)


def rope_cache_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    fused: bool = False,
) -> None:
    """qkv, cos, sin, heads and kv_heads as in `rope_`; k_cache and v_cache [cache rows, kv_heads,
    head_dim] of qkv's dtype, cache_rows [rows] int64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides, heads or head_dim.
    """
    rope_(qkv, cos, sin, heads, kv_heads, fused=fused)
    row = (kv_heads, 2 * cos.shape[1])
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _rows(name, cache, 3, fused)
        _written(name, cache)
        _like(name, cache, "qkv", qkv)
        _shape(name, cache, (cache.shape[0], *row))
    _numbers("cache_rows", cache_rows, torch.int64, "qkv", qkv)
    _shape("cache_rows", cache_rows, (qkv.shape[0],))


def _quantised_cache(name: str, cache: Tensor, k: Tensor) -> None:
    """Rows in 8 bits for keys or values [rows, kv_heads, head_dim] like `k`."""
    _tensor(name, cache, 2, _CACHES)
    _beside(name, cache, "k", k)
    _shape(name, cache, (cache.shape[0], cache_width(*k.shape[1:])))
    _inside_contiguous(name, cache)
    if cache.stride(0) % _SCALE_BYTES or cache.storage_offset() % _SCALE_BYTES:
        raise ValueError(
            f"{name} must have rows at multiples of {_SCALE_BYTES} bytes, got strides "
            f"{cache.stride()} from {cache.storage_offset()} on"
        )


def _quantised_caches(k_cache: Tensor, v_cache: Tensor, k: Tensor) -> None:
    _quantised_cache("k_cache", k_cache, k)
    _quantised_cache("v_cache", v_cache, k)
    _like("v_cache", v_cache, "k_cache", k_cache)


def quantise_cache_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    fused: bool = False,
) -> None:
    """k and v [rows, kv_heads, head_dim] of one dtype; k_cache and v_cache [cache rows,
    `cache_width`], both int8 or both uint8, for the bits of float8_e4m3fn; cache_rows [rows] int64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _rows("k", k, 3, fused)
    if not k.shape[1] or not 1 <= k.shape[2] <= MAX_HIDDEN:
        raise ValueError(f"k must have heads of 1 to {MAX_HIDDEN} columns, got {tuple(k.shape)}")
    _rows("v", v, 3, fused)
    _like("v", v, "k", k)
    _shape("v", v, tuple(k.shape))
    _quantised_caches(k_cache, v_cache, k)
    _written("k_cache", k_cache)
    _written("v_cache", v_cache)
    _numbers("cache_rows", cache_rows, torch.int64, "k", k)
    _shape("cache_rows", cache_rows, (k.shape[0],))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_rows: Tensor, fused: bool, keys: int | None = None
) -> None:
    """`keys` rows of k and v; None for those of q."""
    _rows("q", q, 3, fused)
    rows, heads, head_dim = q.shape
    rows = rows if keys is None else keys
    if fused and head_dim not in HEAD_DIMS:
        raise ValueError(f"q must have a head_dim of 64, 96 or 128, got {head_dim}")
    _rows("k", k, 3, fused)
    _like("k", k, "q", q)
    kv_heads = k.shape[1]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k must have a divisor of q's {heads} heads, got {kv_heads}")
    _shape("k", k, (rows, kv_heads, head_dim))
    _rows("v", v, 3, fused)
    _like("v", v, "q", q)
    _shape("v", v, (rows, kv_heads, head_dim))
    _numbers("cu_rows", cu_rows, torch.int32, "q", q)
    if not cu_rows.shape[0]:
        raise ValueError("cu_rows must have one more element than there are groups, got none")


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_rows: Tensor,
    cache_start: Tensor,
    cache_len: Tensor,
    max_rows: int,
    cu_keys: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    spans: Sequence[int] | None = None,
    fused: bool = False,
) -> None:
    """q [rows, heads, head_dim], k and v [keys, kv_heads, head_dim], k_cache and v_cache
    [cache rows, kv_heads, head_dim], all of one dtype; cu_rows and cu_keys [groups + 1],
    cache_start and cache_len [groups], int32; cos and sin [rows, head_dim / 2] float32, or neither.
    Without cu_keys, keys are rows. spans: six integers for each group, within q, k and k_cache.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides, head_dim or spans.
    """
    _attention_of_a_step(q, k, v, cu_rows, cu_keys, fused)
    _rotation_of_queries(q, cos, sin, fused)
    if spans is not None:
        _spans(spans, cu_rows.shape[0] - 1, (q.shape[0], k.shape[0], k_cache.shape[0]))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _rows(name, cache, 3, fused)
        _like(name, cache, "q", q)
        _shape(name, cache, (cache.shape[0], *k.shape[1:]))
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys
    _groups_of_a_step(q, k, v, k_cache, v_cache, *places, fused)


def attention_step_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_rows: Tensor,
    cache_start: Tensor,
    cache_len: Tensor,
    max_rows: int,
    cu_keys: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    fused: bool = False,
) -> None:
    """q [rows, heads, head_dim], k and v [keys, kv_heads, head_dim], of one dtype; k_cache and
    v_cache [cache rows, `cache_width`], both int8 or both uint8; cu_rows and cu_keys [groups + 1],
    cache_start and cache_len [groups], int32; cos and sin [rows, head_dim / 2] float32, or neither.
    Without cu_keys, keys are rows.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides or head_dim.
    """
    _attention_of_a_step(q, k, v, cu_rows, cu_keys, fused)
    _rotation_of_queries(q, cos, sin, fused)
    _quantised_caches(k_cache, v_cache, k)
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys
    _groups_of_a_step(q, k, v, k_cache, v_cache, *places, fused)


def _spans(spans: Sequence[int], groups: int, ends: tuple[int, int, int]) -> None:
    """Of each group first and last of its rows, of its keys, and of its cache rows."""
    if len(spans) != 6 * groups:
        raise ValueError(
            f"spans must have six integers for each of {groups} groups, got {len(spans)}"
        )
    for place in range(0, len(spans), 2):
        first, last = spans[place], spans[place + 1]
        if not 0 <= first <= last <= ends[place // 2 % 3]:
            raise ValueError(
                f"spans must lie within {', '.join(map(str, ends))} rows, keys and cache rows, got "
                f"{first} to {last} at {place}"
            )


def _attention_of_a_step(
    q: Tensor, k: Tensor, v: Tensor, cu_rows: Tensor, cu_keys: Tensor | None, fused: bool
) -> None:
    if cu_keys is None:
        _attention(q, k, v, cu_rows, fused)
        return
    _rows("k", k, 3, fused)
    _attention(q, k, v, cu_rows, fused, k.shape[0])
    _numbers("cu_keys", cu_keys, torch.int32, "q", q)
    _shape("cu_keys", cu_keys, tuple(cu_rows.shape))


def _rotation_of_queries(q: Tensor, cos: Tensor | None, sin: Tensor | None, fused: bool) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"cos and sin must come together, {missing} is None")
    if q.shape[2] % 2:
        raise ValueError(f"q must have an even head_dim to be rotated, got {q.shape[2]}")
    _rotary("cos", cos, "q", q, q.shape[2] // 2, fused)
    _rotary("sin", sin, "q", q, q.shape[2] // 2, fused)


def _groups_of_a_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_rows: Tensor,
    cache_start: Tensor,
    cache_len: Tensor,
    max_rows: int,
    cu_keys: Tensor | None,
    fused: bool,
) -> None:
    """What a step asks of its groups, however the cache keeps its rows."""
    if v_cache.shape[0] != k_cache.shape[0]:
        _shape("v_cache", v_cache, k_cache.shape)
    groups = cu_rows.shape[0] - 1
    for name, numbers in (("cache_start", cache_start), ("cache_len", cache_len)):
        _numbers(name, numbers, torch.int32, "q", q)
        _shape(name, numbers, (groups,))
    _longest(max_rows, q.shape[0], groups)
    if fused:
        cached, longest = k_cache.shape[0], max_rows if cu_keys is None else k.shape[0]
        _near((("q", q, max_rows), ("k", k, longest), ("v", v, longest)))
        _near((("k_cache", k_cache, cached), ("v_cache", v_cache, cached)))


def join_segments(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, fused: bool = False) -> None:
    """a and b [rows, heads, head_dim], of one dtype; a_lse and b_lse [rows, heads], float32, or
    float64 with float64.

    Heads may lie apart, and log-sum-exps in any order.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    for name, x in (("a", a), ("b", b)):
        _tensor(name, x, 3, _FUSED if fused else _FLOATS)
        _like(name, x, "a", a)
        _shape(name, x, a.shape)
        if x.stride(2) != 1 and x.shape[2] != 1:
            raise ValueError(
                f"{name} must be contiguous inside a head, got strides {x.stride()}; .contiguous() "
                "makes it so"
            )
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    for name, x in (("a_lse", a_lse), ("b_lse", b_lse)):
        _tensor(name, x, 2, (wide,))
        _beside(name, x, "a", a)
        _shape(name, x, tuple(a.shape[:2]))
    if fused and a.shape[0] * a.shape[1] >= 1 << 31:
        raise ValueError(f"a must have less than 2^31 heads of rows, got shape {tuple(a.shape)}")
    if fused and a.shape[2] > MAX_HIDDEN:
        raise ValueError(f"a must have a head_dim of up to {MAX_HIDDEN}, got {a.shape[2]}")


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_rows: Tensor,
    kv_end: Tensor,
    max_rows: int,
    first: int = 0,
    fused: bool = False,
) -> None:
    """q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], of one dtype; cu_rows
    [groups + 1] and kv_end [rows], int32; first from 0 to max_rows.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides or head_dim.
    """
    _attention(q, k, v, cu_rows, fused)
    _numbers("kv_end", kv_end, torch.int32, "q", q)
    _shape("kv_end", kv_end, (q.shape[0],))
    _longest(max_rows, q.shape[0], cu_rows.shape[0] - 1)
    if not 0 <= first <= max_rows:
        raise ValueError(f"first must be a row of the longest group, 0 to {max_rows}, got {first}")
    if fused:
        _near((("q", q, max_rows), ("k", k, max_rows), ("v", v, max_rows)))


def _near(x_rows: tuple[tuple[str, Tensor, int], ...]) -> None:
    """The kernels count elements from a group's first row in 32 bits."""
    for name, x, rows in x_rows:
        if rows * x.stride(0) >= 1 << 31:
            raise ValueError(
                f"{name} must have less than 2^31 elements between a group's first and last row, "
                f"got {rows} rows of {x.stride(0)}"
            )


def _longest(max_rows: int, rows: int, groups: int) -> None:
    """The longest of the groups can't be shorter than their mean."""
    if max_rows * groups < rows:
        raise ValueError(
            f"max_rows must be the rows of the longest group, at least {-(-rows // groups)} with "
            f"{rows} rows in {groups} groups, got {max_rows}"
            if groups
            else f"cu_rows must hold a group for the {rows} rows, got none"
        )


def swiglu(gate_up: Tensor, fused: bool = False) -> None:
    """gate_up [rows, 2 * intermediate].

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or strides.
    """
    _rows("gate_up", gate_up, 2, fused)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {gate_up.shape[1]}")


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, step: Tensor, eps: float, fused: bool = False
) -> None:
    """x [rows, hidden], shift and scale [steps, hidden], of one dtype; step [groups] int64, rows a
    multiple of groups.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _hidden("x", x, fused)
    for name, table in (("shift", shift), ("scale", scale)):
        _rows(name, table, 2, fused)
        _like(name, table, "x", x)
        _shape(name, table, (shift.shape[0], x.shape[1]))
    _numbers("step", step, torch.int64, "x", x)
    rows, groups = x.shape[0], step.shape[0]
    if not groups or rows % groups:
        raise ValueError(
            f"step must divide x's rows into equal groups, got {groups} steps for {rows} rows"
        )


def guidance_step_(
    latents: Tensor,
    prediction: Tensor,
    coefficient: Tensor,
    cu_groups: Tensor,
    lengths: Tensor,
    step: Tensor,
    patch: int,
    fused: bool = False,
) -> None:
    """latents [images, channels, height, width] float32, contiguous; prediction [groups, tokens,
    patch * patch * channels]; coefficient [groups] float32; cu_groups [images + 1] int32; lengths
    [steps] float32; step [images] int64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    _tensor("latents", latents, 4, _WIDE[:1] if fused else _WIDE)
    if not latents.is_contiguous():
        raise ValueError(f"latents must be contiguous, got strides {latents.stride()}")
    images, channels, height, width = latents.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patch must divide the latents' height and width, {height} and {width}, got {patch}"
        )
    _tensor("prediction", prediction, 3, _FUSED if fused else _FLOATS)
    _beside("prediction", prediction, "latents", latents)
    groups = prediction.shape[0]
    _shape(
        "prediction",
        prediction,
        (groups, height // patch * (width // patch), patch * patch * channels),
    )
    if prediction.shape[2] > 1 and prediction.stride(2) != 1:
        raise ValueError(
            "prediction must be contiguous inside a token, got strides "
            f"{prediction.stride()}; .contiguous() makes it so"
        )
    _tensor("coefficient", coefficient, 1, (torch.float32,))
    _numbers("coefficient", coefficient, torch.float32, "latents", latents)
    _shape("coefficient", coefficient, (groups,))
    _numbers("cu_groups", cu_groups, torch.int32, "latents", latents)
    _shape("cu_groups", cu_groups, (images + 1,))
    _numbers("lengths", lengths, torch.float32, "latents", latents)
    _numbers("step", step, torch.int64, "latents", latents)
    _shape("step", step, (images,))


def _stored(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """A part of a stored weight."""
    _tensor(name, x, 2, (dtype,))
    _beside(name, x, "weight", like)
    _shape(name, x, shape)
    _inside_contiguous(name, x)


def _expanded(weight: Tensor, fused: bool) -> tuple[int, int, int]:
    """Rows, columns and groups of the weight that is written."""
    _rows("weight", weight, 2, fused)
    _written("weight", weight)
    rows, columns = weight.shape
    return rows, columns, -(-columns // GROUP)


def dequantise_int8_(weight: Tensor, values: Tensor, scales: Tensor, fused: bool = False) -> None:
    """weight [rows, columns]; values [rows, groups * 64] int8 and scales [rows, groups] bfloat16,
    with a group for each 64 columns.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    rows, _, groups = _expanded(weight, fused)
    _stored("values", values, torch.int8, (rows, groups * GROUP), weight)
    _stored("scales", scales, torch.bfloat16, (rows, groups), weight)


def dequantise_fp8_(weight: Tensor, values: Tensor, scales: Tensor, fused: bool = False) -> None:
    """weight [rows, columns]; values [rows, columns] uint8, scales [rows, 1] float32.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    rows, columns, _ = _expanded(weight, fused)
    _stored("values", values, torch.uint8, (rows, columns), weight)
    _stored("scales", scales, torch.float32, (rows, 1), weight)


def dequantise_nf4_(
    weight: Tensor, values: Tensor, scales: Tensor, ranges: Tensor, fused: bool = False
) -> None:
    """weight [rows, columns]; values [rows, groups * 32] and scales [rows, groups] uint8, ranges
    [rows, 2] float32, with a group for each 64 columns.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or strides.
    """
    rows, _, groups = _expanded(weight, fused)
    _stored("values", values, torch.uint8, (rows, groups * GROUP // 2), weight)
    _stored("scales", scales, torch.uint8, (rows, groups), weight)
    _stored("ranges", ranges, torch.float32, (rows, 2), weight)
