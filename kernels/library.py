"""Attention of a step by libraries that PyTorch brings: a call for each key segment, then a join.

A library takes one segment of keys. It returns the log-sum-exp of the scores beside its output, and
`ops.join_segments` makes one attention of both (Milakov & Gimelshein, 2018): no concatenation.

"flash" on a GPU is PyTorch's FlashAttention: 2, or 3 or 4 where the caller has made one of these
the current (`torch.nn.attention.activate_flash_attention_impl`). All groups run in one call, and
lengths are read on the device. A group's cache rows are its `cu_seqlens_k[g]` to
`cu_seqlens_k[g] + seqused_k[g]`; where `seqused_k` is given, the kernels take nothing but its
first row from `cu_seqlens_k`, so cache rows may overlap and lie in any order. On a CPU it is
PyTorch's own flash attention. "cudnn" is that of cuDNN. The last two take one group at a time, and
lengths from the host: from `spans`, or else from the tensors, which waits for the device.

The prefill's mask, of images between causal text, is one that neither can express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contract, reference

Library: TypeAlias = Literal["flash", "cudnn"]
LIBRARIES: tuple[Library, ...] = ("flash", "cudnn")
# What takes lengths from the host: a CUDA graph of it serves these lengths and places alone.
READS_SPANS: tuple[Library, ...] = ("cudnn",)

_HALVES = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
_FLASH_HEADS = 256  # largest head_dim
_HEAD_UNIT = 8  # head dims are multiples of this
_SAMPLE = 128  # rows of the tensors that cuDNN's conditions are asked with

Join: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def why_not(name: Library, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps a library from computing attention like this; None where it does."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _why_not_on_a_gpu(name, index, dtype, head_dim)
    if name == "cudnn":
        return "it is for NVIDIA GPUs"
    return None if device.type == "cpu" else "it is for NVIDIA GPUs and CPUs"


@lru_cache(maxsize=64)
def _why_not_on_a_gpu(name: Library, index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    if torch.version.cuda is None:
        return "this build of PyTorch is not for CUDA"
    if dtype not in _HALVES:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if head_dim % _HEAD_UNIT:
        return f"it takes heads of multiples of {_HEAD_UNIT}, not of {head_dim}"
    if name == "flash":
        if head_dim > _FLASH_HEADS:
            return f"it takes heads of up to {_FLASH_HEADS}, not of {head_dim}"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of PyTorch has none"
        return None
    return _why_not_cudnn(index, dtype, head_dim)


def _why_not_cudnn(index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """By PyTorch's own conditions, which differ between versions of cuDNN."""
    if not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    sample = torch.empty(1, 1, _SAMPLE, head_dim, dtype=dtype, device=torch.device("cuda", index))
    asked = torch.backends.cuda.SDPAParams(sample, sample, sample, None, 0.0, False, False)
    if not torch.backends.cuda.can_use_cudnn_attention(asked):
        return f"its version here takes no heads of {head_dim}, or it is switched off"
    return None


def attention_step(
    name: Library,
    join: Join,
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
    spans: list[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.attention_step`.

    Args:
        name: who computes it.
        join: `join_segments` of the implementation that has the other operations.
        q: see `reference.attention_step`; so are the others.

    Raises:
        TypeError, ValueError: see `contract.attention_step`; or the library can't compute this.
    """
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys
    contract.attention_step(q, k, v, k_cache, v_cache, *places, cos, sin, spans)
    reason = why_not(name, q.device, q.dtype, q.shape[2])
    if reason is not None:
        raise ValueError(f'attention="{name}" can\'t run on {q.device}: {reason}')
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        contract.same("out", out, q)
    if not out.numel() or len(cu_rows) == 1:
        return out
    if cos is not None and sin is not None:
        # in the place of the result, which is written when the queries are done with
        reference._rotate(q, cos, sin, out)
        q = out
    if _takes_packed(name, q):
        keys = (cu_rows, max_rows) if cu_keys is None else (cu_keys, k.shape[0])
        own = _packed(q, k, v, cu_rows, max_rows, *keys)
        if not len(k_cache):
            return out.copy_(own[0])
        starts = F.pad(cache_start, (0, 1))  # one more than there are groups, which nothing reads
        room = len(k_cache)
        cached = _packed(q, k_cache, v_cache, cu_rows, max_rows, starts, room, cache_len)
        return join(*own, *cached, out)
    by_group = _by_group(*places) if spans is None else _grouped(spans)
    for rows, own_keys, cache_rows in by_group:
        some, result = q[rows], out[rows]
        if not len(some):
            continue
        pairs = (k[own_keys], v[own_keys]), (k_cache[cache_rows], v_cache[cache_rows])
        parts = [_dense(name, some, *pair) for pair in pairs if len(pair[0])]
        if len(parts) == 2:
            join(*parts[0], *parts[1], result)
        elif parts:
            result.copy_(parts[0][0])
        else:
            result.zero_()
    return out


def attention_step_8bit(name: Library, *_: object) -> Tensor:
    """Refuses: no library reads a cache in 8 bits.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f'attention="{name}" can\'t read a cache in 8 bits; use attention="triton" or a cache in '
        "the dtype of the queries"
    )


def _takes_packed(name: Library, q: Tensor) -> bool:
    return name == "flash" and q.is_cuda


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_rows: Tensor,
    max_rows: int,
    cu_keys: Tensor,
    max_keys: int,
    key_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashAttention of all groups, [rows, heads, head_dim], and log-sum-exps [rows, heads]."""
    lengths = cu_rows, cu_keys, max_rows, max_keys
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, False, False, seqused_k=key_counts
    )
    return found[0], found[1].t()


def _dense(name: Library, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one group over one segment that has keys, and log-sum-exps [rows, heads]."""
    rows, heads, _ = q.shape
    if name == "cudnn":
        by_head = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*by_head, None, True)[:2]
        return out[0].transpose(0, 1), lse.reshape(heads, rows).t()
    # query heads that share a key head become a batch axis, along which keys need no copy
    share = heads // k.shape[1]
    queries = q.unflatten(1, (-1, share)).permute(2, 1, 0, 3)
    pair = [x.transpose(0, 1).expand(share, -1, -1, -1) for x in (k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, *pair)
    return out.permute(2, 1, 0, 3).flatten(1, 2), lse.permute(2, 1, 0).flatten(1, 2)


_Group: TypeAlias = tuple[slice, slice, slice]


def _grouped(spans: Sequence[int]) -> Iterator[_Group]:
    """Rows, keys and cache rows of each group."""
    for place in range(0, len(spans), 6):
        rows, keys, cached = (slice(spans[i], spans[i + 1]) for i in range(place, place + 6, 2))
        yield rows, keys, cached


def _by_group(
    cu_rows: Tensor, cache_start: Tensor, cache_len: Tensor, _: int, cu_keys: Tensor | None
) -> Iterator[_Group]:
    """Likewise, from the tensors."""
    bounds = cu_rows.tolist()
    own = bounds if cu_keys is None else cu_keys.tolist()
    cached = zip(cache_start.tolist(), cache_len.tolist())
    for rows, keys, (first, length) in zip(pairwise(bounds), pairwise(own), cached):
        yield slice(*rows), slice(*keys), slice(first, first + length)


def operations(name: Library, join: Join) -> dict[str, Callable[..., Tensor]]:
    """What a library computes instead of an implementation whose join is given, by name."""
    return {
        "attention_step": partial(attention_step, name, join),
        "attention_step_8bit": partial(attention_step_8bit, name),
    }


def shapes(attend: Callable[..., Tensor | None]) -> dict[str, Callable[..., Tensor | None]]:
    """Likewise for tensors without values: `attend`, and what the calls take beside its result."""

    def shaped(q: Tensor, *args: Any) -> Tensor | None:
        lses = [torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2)]
        outs = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2)]
        result = attend(q, *args)
        del lses, outs
        return result

    return {"attention_step": shaped}
