"""Products of 16-bit matrices in float32, on CPUs that multiply those faster.

Without matrix units, bfloat16 gains a CPU little or nothing. Some have an instruction that
multiplies twice as many values at a quarter of the rate of float32's; those with AVX2 alone have
none, and PyTorch is 10 times slower there. The operands are copied to float32 in blocks that stay
in the cache: products of 16-bit values are exact in float32, so a result is at least as near.
"""

from __future__ import annotations

import time
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a block of weights, of rows, and of their product. More weights leave the cache; fewer
# rows copy them too often.
_WEIGHTS, _ROWS, _SUMS = 1 << 21, 1 << 23, 1 << 22
# MKL sums fewer rows in another order: a row of a small block would depend on its neighbours.
_LEAST_ROWS = 16
# The product that is timed, how often, and how much faster float32 has to be. CPUs that were
# measured are at 1.9 or more, or at 1.2 or less, so every process decides alike.
_TIMED, _TURNS, _LEAD = (256, 256, 512), 12, 1.4

_decided: dict[torch.dtype, bool] = {}


def faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies float32 faster than a 16-bit dtype: timed once in a process.

    A graph of torch.compile can't time anything: without an earlier call, the answer is no.
    """
    if dtype not in _decided and not torch.compiler.is_compiling():
        _decided[dtype] = dtype in (torch.bfloat16, torch.float16) and _timed(dtype)
    return _decided.get(dtype, False)


def fastest(dtype: torch.dtype) -> torch.dtype:
    """What this CPU computes products of a dtype in."""
    return torch.float32 if faster(dtype) else dtype


def _timed(dtype: torch.dtype) -> bool:
    rows, inner, columns = _TIMED
    narrow, wide = (
        (
            torch.ones(rows, inner, dtype=one, device="cpu"),
            torch.ones(inner, columns, dtype=one, device="cpu"),
            torch.empty(rows, columns, dtype=one, device="cpu"),
        )
        for one in (dtype, torch.float32)
    )
    shortest = [inf, inf]
    for _ in range(_TURNS):  # in turns, and the shortest: the machine may be busy
        for place, (x, weight, out) in enumerate((narrow, wide)):
            start = time.perf_counter()
            torch.mm(x, weight, out=out)
            shortest[place] = min(shortest[place], time.perf_counter() - start)
    return shortest[0] > _LEAD * shortest[1]


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is to be done here: not if its operands differ, which PyTorch refuses."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype != torch.float32
        and faster(x.dtype)
    )


def linear(
    x: Tensor,  # [rows, in features]
    weight: Tensor,  # [out features, in features]
    added: Tensor | None,  # [out features], or [rows, out features], which may be `out`
    out: Tensor,  # [rows, out features]
) -> Tensor:  # [rows, out features]
    """`x @ weight.T + added`, rounded once, in at most 56 MB of scratch memory."""
    (rows, inner), columns = x.shape, len(weight)
    if rows < _LEAST_ROWS:
        beside = (0, 0, 0, _LEAST_ROWS - rows)
        if added is not None and added.dim() == 2:
            added = F.pad(added, beside)
        padded = linear(F.pad(x, beside), weight, added, out.new_empty(_LEAST_ROWS, columns))
        return out.copy_(padded[:rows])
    width = min(columns, max(1, _WEIGHTS // inner))
    height = _even(rows, _ROWS // inner)
    part = _even(height, _SUMS // width)
    wide_x, wide_weight, space = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        for shape in ((height, inner), (width, inner), (part * width,))
    )
    for top in range(0, rows, height):
        some_x = wide_x[: min(height, rows - top)].copy_(x[top : top + height])
        for left in range(0, columns, width):
            some = slice(left, min(left + width, columns))
            some_weight = wide_weight[: some.stop - left].copy_(weight[some]).t()
            for first in range(0, len(some_x), part):
                factor = some_x[first : first + part]
                here = slice(top + first, top + first + len(factor))
                sums = space[: len(factor) * (some.stop - left)].view(len(factor), -1)
                if added is None:
                    torch.mm(factor, some_weight, out=sums)
                else:
                    sums.copy_(added[some] if added.dim() == 1 else added[here, some])
                    torch.addmm(sums, factor, some_weight, out=sums)
                out[here, some].copy_(sums)
    return out


def _even(rows: int, most: int) -> int:
    """Rows of blocks of about the same height, which is at most that."""
    return -(-rows // -(-rows // max(_LEAST_ROWS, most)))
