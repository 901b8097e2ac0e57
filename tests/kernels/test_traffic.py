"""What the memory-bound kernels move: each tensor that they must touch, once.

Every load and store of the interpreter is noted with its addresses. So the bytes that
`bench.counts` counts for an operation are held to what its kernel does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omnigen_fast.kernels import ops
from omnigen_fast.kernels.contract import cache_width
from torch import Tensor

from bench.counts import Counter, touched
from bench.tracker import MemoryTracker
from omnigen_fast.forms import FORMS
from omnigen_fast.quantised import quantised

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")


class Traffic:
    """Bytes read and written, by the tensor that they belong to; and launches."""

    def __init__(self, monkeypatch) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.launches = 0
        load = InterpreterBuilder.create_masked_load
        store = InterpreterBuilder.create_masked_store
        call = GridExecutor.__call__

        def noted_load(builder, ptrs, mask, *rest):
            self.read.append(ptrs.data[mask.data.astype(bool)].ravel())
            return load(builder, ptrs, mask, *rest)

        def noted_store(builder, ptrs, value, mask, *rest):
            self.written.append(ptrs.data[mask.data.astype(bool)].ravel())
            return store(builder, ptrs, value, mask, *rest)

        def noted_call(executor, *args, **more):
            self.launches += 1
            return call(executor, *args, **more)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        monkeypatch.setattr(GridExecutor, "__call__", noted_call)

    @staticmethod
    def _inside(places: list[np.ndarray], tensor: Tensor) -> np.ndarray:
        every = np.concatenate(places) if places else np.empty(0, np.uint64)
        storage = tensor.untyped_storage()
        first = storage.data_ptr()
        return every[(every >= first) & (every < first + storage.nbytes())]

    def times(self, places: list[np.ndarray], tensor: Tensor) -> tuple[int, int]:
        """Bytes of a tensor's memory that were accessed, and accesses to each of them at most."""
        distinct, counts = np.unique(self._inside(places, tensor), return_counts=True)
        return len(distinct) * tensor.element_size(), int(counts.max(initial=0))


HEADS, KV_HEADS, HEAD_DIM, ROWS = 2, 1, 96, 5


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def cases():
    """(operation, arguments, `out`, what is read and written row by row and so exactly once)."""
    hidden = HEADS * HEAD_DIM
    x, weight = draw(ROWS, hidden), draw(hidden)
    out = torch.empty(ROWS, hidden)
    yield "rms_norm", (x, weight, 1e-5), out, [x], [out]
    gate_up, inner = draw(ROWS, 2 * 64), torch.empty(ROWS, 64)
    yield "swiglu", (gate_up,), inner, [gate_up], [inner]
    for name, given in (
        ("quantise_", (x,)),
        ("rms_norm_quantise_", (x, weight, 1e-5)),
        ("swiglu_quantise_", (gate_up,)),
    ):
        width = hidden if given[0] is not gate_up else 64
        rows = torch.zeros(ROWS, width, dtype=torch.int8), torch.empty(ROWS)
        yield name, (*given, *rows), None, [given[0]], list(rows)
    for form in FORMS:
        weight = draw(ROWS, 128)
        parts = quantised("weight", weight, form).arguments
        yield f"dequantise_{form}_", (weight, *parts), None, [parts[0]], [weight]
    steps = torch.tensor([2, 0, 3, 1, 4])
    yield "modulate", (x, draw(6, hidden), draw(6, hidden), steps, 1e-6), None, [x], []
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = draw(ROWS, HEAD_DIM // 2)
    qkv, tables = draw(ROWS, width), (angles.cos(), angles.sin())
    yield "rope_", (qkv, *tables, HEADS, KV_HEADS), None, [qkv], [qkv]
    qkv = draw(ROWS, width)
    yield "rope_, keys only", (qkv, *tables, HEADS, KV_HEADS, True), None, [qkv], [qkv]
    qkv = draw(ROWS, width)
    caches = [draw(ROWS + 3, KV_HEADS, HEAD_DIM) for _ in range(2)]
    places = torch.randperm(ROWS + 3)[:ROWS]
    arguments = (qkv, *tables, HEADS, KV_HEADS, *caches, places)
    yield "rope_cache_", arguments, None, [qkv], [qkv, *caches]
    k, v = (draw(ROWS, KV_HEADS, HEAD_DIM) for _ in range(2))
    kept = [torch.zeros(ROWS + 3, cache_width(KV_HEADS, HEAD_DIM), dtype=torch.int8) for _ in "kv"]
    yield "quantise_cache_", (k, v, *kept, places), None, [k, v], kept
    parts = [draw(ROWS, HEADS, HEAD_DIM) for _ in "ab"]
    lses, joined = [draw(ROWS, HEADS) for _ in "ab"], torch.empty(ROWS, HEADS, HEAD_DIM)
    arguments = (parts[0], lses[0], parts[1], lses[1])
    yield "join_segments", arguments, joined, [*parts, *lses], [joined]
    latents, prediction = draw(2, 4, 8, 12), draw(3, 24, 16)
    arguments = (latents, prediction, draw(3), torch.tensor([0, 1, 3], dtype=torch.int32))
    arguments += (draw(4), steps[:2].clone(), 2)
    yield "guidance_step_", arguments, None, [latents, prediction], [latents]


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_is_read_and_written_once(name, monkeypatch):
    arguments, out, read, written = CASES[name]
    traffic = Traffic(monkeypatch)
    more = {} if out is None else {"out": out}
    given = [one for one in (*arguments, out) if isinstance(one, Tensor)]
    with ops.use("triton"), Counter() as counter, MemoryTracker(given, "cpu") as tracker:
        result = getattr(ops, name.partition(",")[0])(*arguments, **more)
    (operation,) = counter.operations
    assert traffic.launches == 1
    # what is given a place needs no memory of its own
    fresh = [] if out is not None or result is None else [result]
    # the interpreter converts bfloat16 scales through PyTorch, two tensors for each row
    its_own = 2 * ROWS if name == "dequantise_int8_" else 0
    assert tracker.allocations == len(fresh) + its_own

    for tensor in read:
        assert traffic.times(traffic.read, tensor)[1] == 1, "read more than once"
    for tensor in [*written, *fresh]:
        assert traffic.times(traffic.written, tensor)[1] == 1, "written more than once"
    tensors = {one.untyped_storage().data_ptr(): one for one in [*given, *fresh]}
    found = [
        sum(traffic.times(places, tensor)[0] for tensor in tensors.values())
        for places in (traffic.read, traffic.written)
    ]
    # a scale in a row of bytes is noted by its first
    scales = 2 * ROWS * KV_HEADS if name == "quantise_cache_" else 0
    assert found == [operation.read, operation.written - 3 * scales]


def test_touched_counts_elements_once():
    x = torch.empty(4, 1, 6)
    assert touched(x) == touched(x.expand(4, 5, 6)) == 96
    assert touched(x[:, :, ::2]) == 48
