"""A step's attention by libraries: the join of two segments, and how each library is called."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from numerics import DEVICE, DTYPES, assert_earned, double, inside, integers, name, poisoned, random
from omnigen_fast.kernels import contract, join, library, ops, reference
from test_attention import PARTS, STEPS, some_rows, step_arguments, turned, turning

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's flash attention")


def segments(rows, heads, head_dim, dtype, gap=8):
    """Outputs of two segments and their log-sum-exps, as libraries lay them out."""
    a, _ = inside(random(rows, heads, head_dim, dtype=dtype), gap)
    # heads first, as cuDNN may have them
    b = random(heads, rows, head_dim, dtype=dtype, seed=1).transpose(0, 1)
    a_lse = 4 * random(heads, rows, seed=2).t()
    b_lse = 4 * random(rows, heads, seed=3)
    return a, a_lse, b, b_lse


def check_join(*args):
    a = args[0]
    out, untouched = poisoned(*a.shape, dtype=a.dtype)
    assert join.join_segments(*args, out=out) is out
    assert untouched()
    assert_earned(out, reference.join_segments(*args), reference.join_segments(*double(*args)))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", (64, 80, 96, 128))
@pytest.mark.parametrize("rows", (0, 1, 63, 64, 65))
def test_join(rows, head_dim, dtype):
    check_join(*segments(rows, 3, head_dim, dtype))


def test_join_is_attention_over_both_segments():
    """Against one softmax over all keys, in float64."""
    q, keys, values = (random(rows, 2, 64, seed=rows).double() for rows in (9, 30, 31))
    values = values[:30]

    def attend(first, last):
        scores = torch.einsum("qhd,khd->qhk", q, keys[first:last]) / 8
        out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values[first:last])
        return out, scores.logsumexp(-1)

    whole, _ = attend(0, 30)
    found = reference.join_segments(*attend(0, 11), *attend(11, 30))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    narrow = [x.float() for x in (*attend(0, 11), *attend(11, 30))]
    torch.testing.assert_close(join.join_segments(*narrow), whole.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("infinite", (math.inf, -math.inf))
@pytest.mark.parametrize("fill", (0.0, math.nan))
def test_a_segment_without_keys_counts_nothing(infinite, fill):
    a, a_lse, b, b_lse = segments(10, 2, 64, torch.float32)
    a_lse, a, b = a_lse.clone(), a.clone(), b.clone()
    a_lse[:4], b_lse[2:6] = infinite, -infinite
    a[:4], b[2:6] = fill, fill
    for run in (join.join_segments, reference.join_segments):
        out = run(a, a_lse, b, b_lse)
        assert torch.equal(out[:2], b[:2]) and torch.equal(out[4:6], a[4:6])
        assert torch.equal(out[2:4], torch.zeros(2, 2, 64, device=DEVICE))
        assert out.isfinite().all()


@pytest.mark.parametrize("offset", (-1e4, 1e4))
def test_join_of_large_log_sum_exps(offset):
    """Their exponentials would overflow, or vanish."""
    a, a_lse, b, b_lse = segments(10, 2, 64, torch.float32)
    check_join(a, a_lse + offset, b, b_lse + offset)
    out = check_join(a, a_lse + offset, b, b_lse)
    torch.testing.assert_close(out, a if offset > 0 else b, rtol=0, atol=0)


def steps(case, head_dim=64, heads=4, kv_heads=2, dtype=torch.float32):
    return step_arguments(*STEPS[case], heads, kv_heads, head_dim, dtype)


def spans_of(args):
    """The values of a step's five tensors, group by group."""
    cu_rows, starts, cached, *rest = args[5:]
    bounds = cu_rows.tolist()
    keys = rest[1].tolist() if len(rest) > 1 else bounds
    found = []
    for one in zip(pairwise(bounds), pairwise(keys), starts.tolist(), cached.tolist()):
        (first, last), (key, end), start, length = one
        found += [first, last, key, end, start, start + length]
    return found


@contextmanager
def nothing_waits():
    """Fails where a value is read from a tensor."""

    def read(*_):
        raise AssertionError("reads a value from the device")

    with mock.patch.multiple(
        torch.Tensor, tolist=read, item=read, __int__=read, __bool__=read, __index__=read
    ):
        yield


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("kernels", "case", "head_dim"),
    [
        *(("auto", case, head_dim) for case in STEPS for head_dim in (64, 96, 128)),
        *(("triton", case, 96) for case in STEPS if case != "long"),
    ],
)
def test_step_by_the_cpus_flash_attention(kernels, case, head_dim, dtype):
    """The whole door, with the join in plain PyTorch and in the interpreter."""
    args = steps(case, head_dim, dtype=dtype)
    exact = reference.attention_step(*double(*args[:5]), *args[5:])
    plain = reference.attention_step(*args)
    for more in ({}, {"spans": spans_of(args)}):
        out, untouched = poisoned(*args[0].shape, dtype=dtype)
        with ops.use(kernels, attention="flash"):
            assert ops.attention_step(*args, out=out, **more) is out
        assert untouched()
        assert_earned(out, plain, exact)


@needs_cpu
@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 1), (4, 2), (3, 3)))
def test_step_of_some_rows_and_grouped_heads(heads, kv_heads):
    args = some_rows(steps("mixed", 96, heads, kv_heads), PARTS)
    exact = reference.attention_step(*double(*args[:5]), *args[5:])
    with ops.use(attention="flash"):
        for more in ({}, {"spans": spans_of(args)}):
            assert_earned(ops.attention_step(*args, **more), reference.attention_step(*args), exact)


@needs_cpu
@pytest.mark.parametrize("case", ("one row", "mixed", "shared"))
def test_queries_that_are_still_to_be_rotated(case):
    """As with those that `rope_` has rotated, and they stay as they are."""
    args = turning(steps(case, 96))
    before = args[0].clone()
    with ops.use(attention="flash"):
        found = ops.attention_step(*args)
        assert torch.equal(found, ops.attention_step(*turned(args, reference.rope_)))
    assert torch.equal(args[0], before)


def cudnns(q, k, v, bias, compute_log_sumexp, *rest):
    """As cuDNN: dense, [1, heads, rows, head_dim], a log-sum-exp with one more axis."""
    assert bias is None and compute_log_sumexp and not rest and q.shape[0] == 1
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1).double() for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    out = (scores.softmax(-1) @ v).to(q.dtype)
    return out, scores.logsumexp(-1).float().unsqueeze(-1), *(None,) * 7


def flashs(q, k, v, cu_rows, cu_keys, max_rows, max_keys, dropout, causal, debug, seqused_k=None):
    """As FlashAttention 2: packed, zeros and a positive infinity for a group without keys."""
    assert not dropout and not causal and not debug
    assert cu_rows.dtype == cu_keys.dtype == torch.int32 and cu_keys.is_contiguous()
    assert len(cu_keys) == len(cu_rows)  # PyTorch asks for that
    out, lse = torch.zeros_like(q), q.new_full(q.shape[1::-1], math.inf, dtype=torch.float32)
    with mock.patch.multiple(torch.Tensor, tolist=_TOLIST):  # the kernels may read
        bounds, firsts = cu_rows.tolist(), cu_keys.tolist()
        counts = [b - a for a, b in pairwise(firsts)] if seqused_k is None else seqused_k.tolist()
        for (start, stop), first, count in zip(pairwise(bounds), firsts, counts):
            assert stop - start <= max_rows and count <= max_keys
            if count and start < stop:
                part = [x[None, first : first + count].transpose(1, 2) for x in (k, v)]
                some = cudnns(q[None, start:stop].transpose(1, 2), *part, None, True)
                out[start:stop] = some[0][0].transpose(0, 1)
                lse[:, start:stop] = some[1][0, :, :, 0]
    return out, lse, None, None, None


_TOLIST = torch.Tensor.tolist


@contextmanager
def libraries_of_a_gpu():
    """A GPU's libraries on CPU tensors, as they are specified; yields the calls."""
    calls = []

    def counted(run, label):
        def call(*args, **more):
            calls.append(label)
            return run(*args, **more)

        return call

    with (
        mock.patch.object(library, "why_not", return_value=None),
        mock.patch.object(library, "_takes_packed", lambda one, q: one == "flash"),
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", counted(flashs, "flash")),
        mock.patch.object(
            torch.ops.aten, "_scaled_dot_product_cudnn_attention", counted(cudnns, "cudnn")
        ),
    ):
        yield calls


@needs_cpu
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("which", library.LIBRARIES)
def test_how_a_gpus_libraries_are_called(which, case):
    """Every group's own keys and cached ones, nothing read on the host, two calls and a join."""
    for args in (steps(case, 96), some_rows(steps("mixed", 64), PARTS)):
        exact = reference.attention_step(*double(*args[:5]), *args[5:])
        plain = reference.attention_step(*args)
        spans = spans_of(args)
        out, untouched = poisoned(*args[0].shape, dtype=torch.float32)
        joins = mock.Mock(side_effect=reference.join_segments)
        with libraries_of_a_gpu() as calls, nothing_waits():
            library.attention_step(which, joins, *args, **kwargs_of(args, spans), out=out)
        assert untouched()
        assert_earned(out, plain, exact)
        assert set(calls) == {which}
        if which == "flash":
            assert (len(calls), joins.call_count) == ((2, 1) if len(args[3]) else (1, 0))
        else:
            groups = list(zip(*[iter(spans)] * 6))
            assert joins.call_count == sum(b > a and f > e for a, b, _, _, e, f in groups)


def kwargs_of(args, spans):
    return {"spans": spans} if len(args) > 9 else {"cu_keys": None, "spans": spans}


@needs_cpu
def test_cudnn_without_spans_reads_the_tensors():
    args = steps("mixed")
    with libraries_of_a_gpu(), ops.use(attention="cudnn"):
        found = ops.attention_step(*args)
    torch.testing.assert_close(found, reference.attention_step(*args), rtol=1e-5, atol=1e-5)


def test_no_cache_rows_at_all():
    args = steps("no cache")
    q, k, v, k_cache, v_cache, *rest = args
    args = (q, k, v, k_cache[:0], v_cache[:0], *rest)
    expected = reference.attention_step(*args)
    if DEVICE == "cpu":
        with libraries_of_a_gpu(), ops.use(attention="flash"):
            found = ops.attention_step(*args)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with ops.use(attention="flash"):
            found = ops.attention_step(*args)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_spans_must_fit():
    args = steps("mixed")
    good = spans_of(args)
    contract.attention_step(*args, None, None, None, good)
    for wrong, said in (
        (good[:-1], "six integers for each of 4 groups, got 23"),
        ([*good[:1], 999, *good[2:]], "within 193, 193 and"),
        ([5, 4, *good[2:]], "got 5 to 4 at 0"),
        ([*good[:4], -1, *good[5:]], "got -1 to 70 at 4"),
    ):
        with pytest.raises(ValueError, match="spans must") as error:
            contract.attention_step(*args, None, None, None, wrong)
        assert said in str(error.value).replace("193, 193, ", "193, 193 and ")


@needs_cpu
def test_refusals_of_a_named_library():
    args = steps("mixed")
    with ops.use(attention="cudnn"), pytest.raises(ValueError, match=r"cudnn.*for NVIDIA GPUs"):
        ops.attention_step(*args)
    q, k, v, *_ = args
    narrow = [torch.zeros(9, contract.cache_width(2, 64), dtype=torch.int8) for _ in range(2)]
    places = integers(0, len(q)), integers(0), integers(9), len(q)
    with ops.use(attention="flash"), pytest.raises(ValueError, match="a cache in 8 bits"):
        ops.attention_step_8bit(q, k, v, *narrow, *places)


def test_what_keeps_a_library_from_a_gpu():
    ask = library._why_not_on_a_gpu.__wrapped__
    half = torch.bfloat16

    def asked(which, dtype, head_dim, capability=(9, 0), cuda="13.0", flash=True, cudnn=True):
        with (
            mock.patch("torch.version.cuda", cuda),
            mock.patch("torch.cuda.get_device_capability", return_value=capability),
            mock.patch("torch.backends.cuda.is_flash_attention_available", return_value=flash),
            mock.patch.object(library, "_why_not_cudnn", return_value=None if cudnn else "no"),
        ):
            return ask(which, 0, dtype, head_dim)

    for which in library.LIBRARIES:
        assert asked(which, half, 96) is None
        assert "not float32" in asked(which, torch.float32, 96)
        assert "not for CUDA" in asked(which, half, 96, cuda=None)
        assert "7.5 is below 8.0" in asked(which, half, 96, capability=(7, 5))
        assert "multiples of 8, not of 100" in asked(which, half, 100)
    assert "up to 256, not of 264" in asked("flash", half, 264)
    assert "has none" in asked("flash", half, 96, flash=False)
    assert asked("cudnn", half, 96, cudnn=False) == "no"
    assert library.why_not("flash", CPU, torch.float32, 100) is None
    assert library.why_not("cudnn", CPU, half, 96) == "it is for NVIDIA GPUs"
    assert "NVIDIA GPUs and CPUs" in library.why_not("flash", torch.device("mps"), half, 96)


def test_cudnns_own_conditions():
    """Asked with a sample of the same heads."""
    seen = []

    def conditions(asked):
        seen.append(tuple(asked.query.shape))
        return asked.query.shape[3] <= 128

    real = torch.empty
    with (
        mock.patch("torch.backends.cudnn.is_available", return_value=True),
        mock.patch("torch.backends.cuda.can_use_cudnn_attention", conditions),
        mock.patch.object(torch, "empty", lambda *shape, dtype, device: real(*shape, dtype=dtype)),
    ):
        assert library._why_not_cudnn(0, torch.bfloat16, 96) is None
        assert "no heads of 256" in library._why_not_cudnn(0, torch.bfloat16, 256)
    assert seen == [(1, 1, 128, 96), (1, 1, 128, 256)]
    with mock.patch("torch.backends.cudnn.is_available", return_value=False):
        assert "no cuDNN" in library._why_not_cudnn(0, torch.bfloat16, 96)


def test_meta_tensors_take_the_memory_of_the_calls():
    from bench.tracker import MemoryTracker

    rows, heads, head_dim = 24, 2, 64
    q, k, v = (torch.empty(rows, heads, head_dim, device="meta") for _ in range(3))
    out = torch.empty_like(q)
    ints = [torch.empty(n, dtype=torch.int32, device="meta") for n in (2, 1, 1)]
    args = (q, k, v, k, v, *ints, rows)
    with MemoryTracker([q, k, v, out, *ints]) as memory:
        ops.attention_step(*args, out=out)
        assert memory.allocations == 0
        before = memory.peak_bytes
        with ops.use(attention="flash"):
            ops.attention_step(*args, out=out)
        assert memory.allocations == 4
    assert memory.peak_bytes - before == 2 * (q.nbytes + rows * heads * 4)


def test_lengths_of_every_group():
    assert list(library._grouped(list(range(12)))) == [
        (slice(0, 1), slice(2, 3), slice(4, 5)),
        (slice(6, 7), slice(8, 9), slice(10, 11)),
    ]
    lengths = [3, 0, 2]
    cu_rows = integers(*accumulate(lengths, initial=0))
    found = list(library._by_group(cu_rows, integers(4, 0, 1), integers(2, 0, 9), 3, None))
    assert found[0] == (slice(0, 3), slice(0, 3), slice(4, 6))
    assert found[2] == (slice(3, 5), slice(3, 5), slice(1, 10))
